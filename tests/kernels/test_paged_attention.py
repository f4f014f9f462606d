"""PagedAttention's kernels compute what the reference computes, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_harness import memory
from kernel_harness.interpret import run

from trtforge.errors import PluginError
from trtforge.plugins.bundle import arch_for
from trtforge.plugins.launch import Call, Gpu
from trtforge.plugins.op import Array
from trtforge.plugins.operators import OPERATORS
from trtforge.plugins.paged_attention import launch
from trtforge.plugins.paged_attention.cases import CASES, TOLERANCE, Case, make_inputs

OPERATOR = OPERATORS["PagedAttention"]
Interpret = Callable[..., tuple[Array, ...]]

# Few multiprocessors: a few splits are as good a test as many.
H100, A100 = Gpu(90, 16), Gpu(80, 16)
QUICK = {case.name: case for case in CASES if case.quick}


def call_of(case: Case, **changes: object) -> Call:
    inputs = make_inputs(case)
    shapes = {name: array.shape for name, array in inputs.items()}
    dtypes = {name: array.dtype.name for name, array in inputs.items()}
    return replace(Call(shapes, dtypes, case.attributes), **changes)


def assert_close(got: Array, expected: Array, case: Case) -> None:
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), rtol=0, atol=TOLERANCE[case.dtype]
    )


@pytest.mark.parametrize(
    ("name", "gpu"),
    [*((name, H100) for name in QUICK), ("mixed", A100), ("e4m3", A100), ("int8", A100)],
    ids=lambda value: value if isinstance(value, str) else f"sm{value.arch}",
)
def test_kernels_equal_reference(interpret: Interpret, name: str, gpu: Gpu) -> None:
    case = QUICK[name]
    inputs = make_inputs(case)
    out, cache = interpret(OPERATOR, inputs, case.attributes, gpu)
    expected_out, expected_cache = OPERATOR.reference(**inputs, **case.attributes)
    np.testing.assert_array_equal(cache.view(np.uint8), expected_cache.view(np.uint8))
    assert_close(out, expected_out, case)


@pytest.mark.parametrize("seed", range(3))
def test_sequences_of_a_batch_do_not_know_of_each_other(interpret: Interpret, seed: int) -> None:
    rng = np.random.default_rng(seed)
    totals = rng.integers(1, 150, size=5)
    lens = tuple((int(rng.integers(0, min(total, 40) + 1)), int(total)) for total in totals)
    case = Case(f"random-{seed}", ((1, 90), *lens), window=int(rng.integers(0, 60)), sinks=bool(seed % 2))
    inputs = make_inputs(case)
    batch, _ = interpret(OPERATOR, inputs, case.attributes, H100)
    starts = inputs["cu_seqlens"]
    for sequence, (new, _) in enumerate(case.lens):
        if new == 0:
            continue
        rows = slice(starts[sequence], starts[sequence + 1])
        alone = inputs | {name: inputs[name][rows] for name in ("q", "k", "v", "slot_mapping")}
        for name in ("block_tables", "context_lens"):
            alone[name] = inputs[name][sequence : sequence + 1]
        alone["cu_seqlens"] = np.array([0, new], np.int32)
        assert_close(batch[rows], interpret(OPERATOR, alone, case.attributes, H100)[0], case)


@pytest.mark.parametrize("gpu", [H100, A100], ids=["sm90", "sm80"])
@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "int8"])
def test_every_float16_is_stored_as_the_nearest_value(
    interpret: Interpret, cache_dtype: str, gpu: Gpu
) -> None:
    """Ties, subnormals, and what is too large: of tokens of no sequence, since only their storing counts."""
    case = Case("all", ((0, 0),), 16, 16, 256, dtype="float16", cache_dtype=cache_dtype, padding=16)
    inputs = make_inputs(case)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    inputs["k"] = np.where(np.isfinite(halves), halves, 0).reshape(16, 16, 256)
    inputs["v"] = inputs["k"][::-1].copy()
    inputs["slot_mapping"] = np.arange(16, dtype=np.int32)
    out, cache = interpret(OPERATOR, inputs, case.attributes, gpu)
    expected_out, expected_cache = OPERATOR.reference(**inputs, **case.attributes)
    np.testing.assert_array_equal(cache.view(np.uint8), expected_cache.view(np.uint8))
    np.testing.assert_array_equal(out, expected_out)  # zeros


def test_caches_of_more_than_2_to_the_31_elements() -> None:
    """The step's only block lies behind them. Memory that nobody touches costs nothing."""
    case = Case("far", ((1, 5),), 1, 1, dtype="float16", cache_dtype="int8")
    inputs = make_inputs(case)
    block_elements = inputs["kv_cache"][0].size
    far = 2**31 // block_elements + 1
    near = int(inputs["block_tables"][0, 0])
    expected, expected_cache = OPERATOR.reference(**inputs, **case.attributes)
    inputs["block_tables"][:] = far
    inputs["slot_mapping"] += (far - near) * case.block_size
    buffers = {
        name: torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
        for name, array in inputs.items()
    }
    cache = torch.empty((far + 1) * block_elements, dtype=torch.int8)
    cache[far * block_elements :] = torch.from_numpy(inputs["kv_cache"][near].copy()).flatten()
    buffers |= {"kv_cache_out": cache, "out": torch.zeros(expected.nbytes, dtype=torch.uint8)}
    with memory.only(buffers):
        for step in OPERATOR.kernels.plan(call_of(case), H100).launches:
            run(step, buffers)
    np.testing.assert_array_equal(cache[far * block_elements :].numpy(), expected_cache[near].ravel())
    assert_close(buffers["out"].numpy().view(np.float16).reshape(expected.shape), expected, case)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_plans_use_the_kernels_that_were_announced_and_only_those(capability: int) -> None:
    rng = np.random.default_rng(capability)
    for heads, kv_heads, window, cache_dtype in ((32, 8, 0, ""), (5, 1, 700, "int8"), (64, 1, 0, "")):
        case = Case("any", ((1, 1),), heads, kv_heads, window=window, cache_dtype=cache_dtype)
        call = call_of(case)
        varying = call.shapes.keys() - {"k_scale", "v_scale"}
        announced = launch.choices(
            replace(call, shapes=call.shapes | {n: (-1, *call.shapes[n][1:]) for n in varying}),
            arch_for(capability),
        )
        used = set()
        for _ in range(200):
            num_tokens, num_seqs, max_blocks = (int(2**x) for x in rng.uniform(0, [14, 10, 13]))
            shapes = dict(call.shapes)
            for name in ("q", "k", "v", "slot_mapping"):
                shapes[name] = (num_tokens, *shapes[name][1:])
            shapes |= {"context_lens": (num_seqs,), "cu_seqlens": (num_seqs + 1,)}
            shapes["block_tables"] = (num_seqs, max_blocks)
            plan = launch.plan(replace(call, shapes=shapes), Gpu(capability, int(rng.integers(1, 200))))
            used |= {step.kernel for step in plan.launches}
            for step in plan.launches:
                constants = dict(step.kernel.constants)
                if constants.get("SPLIT"):  # every token of a tile of every sequence, in float32
                    parts = num_seqs * (constants["ROWS"] // constants["GROUP"]) * heads * step.grid[2]
                    assert plan.workspace["partial_out"] >= 4 * parts * case.head_dim
                    assert plan.workspace["partial_lse"] >= 4 * parts
            assert all(0 < y < 2**16 and 0 < z < 2**16 for _, y, z in (step.grid for step in plan.launches))
        assert used == set(announced)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, r"queries of float32; it takes one of \('float16', 'bfloat16'\)"),
        ({"dtype": "float16", "cache_dtype": "bfloat16"}, "a cache of bfloat16; it takes for float16"),
        ({"head_dim": 72}, "head_dim 72"),
        ({"block_size": 24}, "block_size 24"),
        ({"heads": 7}, "7 heads over 2 KV heads"),
        ({"heads": 71, "kv_heads": 1}, "64 at most"),
        ({"lens": ((0, 0),)}, "0 tokens"),
    ],
)
def test_what_the_kernels_cannot_do(change: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        launch.plan(call_of(replace(Case("plain", ((1, 1),)), **change)), H100)


@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [("slot_mapping", "int64", "int32"), ("sinks", "float32", "bfloat16"), ("k_scale", "float16", "float32")],
)
def test_other_inputs_have_the_dtype_that_the_kernels_read(name: str, dtype: str, allowed: str) -> None:
    call = call_of(QUICK["mixed"])
    with pytest.raises(PluginError, match=f"{name} of {dtype}; it takes {allowed}"):
        launch.plan(replace(call, dtypes=call.dtypes | {name: dtype}), H100)

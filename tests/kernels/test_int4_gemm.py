"""Int4Gemm's kernels, in the interpreter and as machine code."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness.sass import Sass

from trtforge.errors import PluginError
from trtforge.plugins.aot import compile_kernel
from trtforge.plugins.bundle import ARCHS, arch_for, max_shared_bytes
from trtforge.plugins.int4_gemm import launch
from trtforge.plugins.int4_gemm.cases import CASES, Case, exact_inputs, random_inputs
from trtforge.plugins.int4_gemm.launch import choices, plan
from trtforge.plugins.int4_gemm.op import INT4_GEMM, packed_shape
from trtforge.plugins.int4_gemm.packing import unpack
from trtforge.plugins.launch import Call, Gpu, Kernel
from trtforge.plugins.operators import OPERATORS

OPERATOR = OPERATORS["Int4Gemm"]
DTYPES = [np.float16, ml_dtypes.bfloat16]
H100 = Gpu(90, 132)
Interpret = Callable[..., tuple[np.ndarray, ...]]
SassOf = Callable[[Kernel, int], Sass]


def reference(inputs: dict[str, np.ndarray]) -> np.ndarray:
    return OPERATOR.reference(*(inputs.get(tensor.name) for tensor in INT4_GEMM.inputs))


def call(
    num_tokens: int,
    out_features: int,
    in_features: int,
    num_groups: int,
    *,
    dtype: str = "bfloat16",
    bias: bool = False,
    perm: bool = False,
) -> Call:
    shapes: dict[str, tuple[int, ...]] = {
        "x": (num_tokens, in_features),
        "weight": packed_shape(out_features, in_features),
        "scales": (num_groups, out_features, 2),
    }
    dtypes = {"x": dtype, "weight": "int32", "scales": dtype}
    if bias:
        shapes["bias"], dtypes["bias"] = (out_features,), dtype
    if perm:
        shapes["perm"], dtypes["perm"] = (in_features,), "int32"
    return Call(shapes, dtypes, {})


def call_of(case: Case, dtype: str = "bfloat16") -> Call:
    sizes = (case.num_tokens, case.out_features, case.in_features, case.num_groups)
    return call(*sizes, dtype=dtype, bias=case.bias, perm=case.act_order)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_the_same_bits_as_the_reference_where_nothing_is_rounded(
    interpret: Interpret, case: str, dtype: type
) -> None:
    inputs = exact_inputs(CASES[case], dtype)
    (y,) = interpret(OPERATOR, inputs, {}, H100)
    np.testing.assert_array_equal(y, reference(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["group-32", "one-token-split", "one-group", "prefill"])
def test_kernels_round_no_more_than_they_must(interpret: Interpret, case: str, dtype: type) -> None:
    inputs = random_inputs(CASES[case], dtype)
    (y,) = interpret(OPERATOR, inputs, {}, H100)
    expected = reference(inputs).astype(np.float32)
    # y is rounded to dtype in both, which may put them on neighbouring numbers: one spacing, 2 * unit.
    # Sums in float32 err by far less than its 2^-24 times the number of terms. Only for many tokens are the
    # dequantized weights rounded to dtype: each product may then err by one unit.
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    weight = unpack(inputs["weight"], inputs["scales"], inputs.get("perm"), inputs["x"].shape[1])
    magnitude = np.abs(inputs["x"].astype(np.float32)) @ np.abs(weight.dequantize()).T
    in_product = unit if len(y) > launch.LARGEST_FUSED else 2.0**-24 * inputs["x"].shape[1]
    bound = 2 * unit * np.abs(expected) + in_product * magnitude
    assert (np.abs(y.astype(np.float32) - expected) <= bound).all()


@pytest.mark.parametrize("case", ["one-group-of-a-part-of-a-step", "group-64", "prefill"])
def test_tokens_do_not_touch_each_other(interpret: Interpret, case: str) -> None:
    inputs = exact_inputs(CASES[case], np.float16)
    expected = reference(inputs)
    inputs["x"][-1, ::3] = np.nan
    (y,) = interpret(OPERATOR, inputs, {}, H100)
    assert np.isnan(y[-1]).all()
    np.testing.assert_array_equal(y[:-1], expected[:-1])


def test_a_large_weight_is_dequantized_in_slices(
    interpret: Interpret, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(257, 600, 96, 3, zeros=True, bias=True)
    monkeypatch.setattr(launch, "SLICE_BYTES", 128 * 2 * 300)
    planned = plan(call_of(case), H100)
    assert len(planned.launches) == 6
    assert planned.workspace == {"dequantized": 128 * 2 * 256}
    inputs = exact_inputs(case, ml_dtypes.bfloat16)
    (y,) = interpret(OPERATOR, inputs, {}, H100)
    np.testing.assert_array_equal(y, reference(inputs))


def test_cases_reach_every_function() -> None:
    planned = {step.kernel.function for case in CASES.values() for step in plan(call_of(case), H100).launches}
    assert planned == {kernel.function for kernel in choices(call_of(CASES["prefill"]), 90)} | {"add_splits"}


@settings(deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5000), st.integers(1, 200_000)),
    groups=st.tuples(st.sampled_from([32, 64, 128]), st.integers(1, 200)),
    options=st.fixed_dictionaries({"bias": st.booleans(), "perm": st.booleans()}),
    gpu=st.builds(Gpu, st.sampled_from([86, *ARCHS]), st.integers(1, 200)),
)
def test_choices_hold_every_kernel_of_a_plan(
    sizes: tuple[int, int], groups: tuple[int, int], options: dict[str, bool], gpu: Gpu
) -> None:
    num_tokens, out_features = sizes
    size, num_groups = groups
    known = plan(call(num_tokens, out_features, size * num_groups, num_groups, **options), gpu)
    any_tokens = call(-1, out_features, size * num_groups, num_groups, **options)
    assert {step.kernel for step in known.launches} <= set(choices(any_tokens, arch_for(gpu.arch)))
    # What the driver takes; more rows of blocks would need another grid.
    assert all(max(step.grid[1:]) <= 65535 for step in known.launches)
    assert known.workspace.get("dequantized", 0) <= launch.SLICE_BYTES


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(1, 600), min_size=2, max_size=2),
    out_features=st.integers(1, 100_000),
    groups=st.tuples(st.sampled_from([32, 64, 128]), st.integers(1, 200)),
    num_sms=st.integers(1, 200),
)
def test_more_tokens_need_no_less_workspace(
    tokens: list[int], out_features: int, groups: tuple[int, int], num_sms: int
) -> None:
    size, num_groups = groups
    calls = [call(num, out_features, size * num_groups, num_groups, perm=True) for num in sorted(tokens)]
    fewer, more = (sum(plan(c, Gpu(90, num_sms)).workspace.values()) for c in calls)
    assert fewer <= more


def test_no_tokens_need_no_launch() -> None:
    assert plan(call(0, 64, 128, 1), H100).launches == ()


def test_few_kernels_are_compiled_in_advance() -> None:
    one = choices(call(-1, 4096, 4096, 32), 90)
    assert len(one) == len(set(one)) == 10
    # Layers that differ in their sizes alone share them.
    assert set(one) == set(choices(call(-1, 14336, 4096, 32), 90))


def test_what_the_kernels_do_not_take_is_refused() -> None:
    with pytest.raises(PluginError, match=r"x is float32; its kernels take \('float16', 'bfloat16'\)"):
        plan(call(1, 64, 128, 1, dtype="float32"), H100)
    with pytest.raises(PluginError, match="in_features is 100, which is no multiple of 32"):
        choices(call(-1, 64, 100, 1), 90)
    good = call(1, 64, 128, 1)
    with pytest.raises(PluginError, match=r"is stored as \(1, 1, 64, 16\), not \(64, 64\)"):
        plan(Call(good.shapes | {"weight": (64, 64)}, good.dtypes, {}), H100)
    with pytest.raises(PluginError, match="scales and bias must be bfloat16"):
        plan(Call(good.shapes, good.dtypes | {"scales": "float16"}, {}), H100)


def kernels(function: str, call: Call, arch: int = 90, **constants: int) -> list[Kernel]:
    """The choices that are this function with these constants."""
    return [
        kernel
        for kernel in choices(call, arch)
        if kernel.function == function and constants.items() <= dict(kernel.constants).items()
    ]


# Projections of Llama 3 8B.
@pytest.mark.parametrize(
    ("dtype", "num_groups", "block_m"),
    [
        ("bfloat16", 32, 16),
        ("bfloat16", 32, 32),
        ("bfloat16", 32, 64),
        ("float16", 32, 16),
        ("bfloat16", 64, 64),
        ("bfloat16", 128, 16),
        ("bfloat16", 128, 64),
        ("bfloat16", 1, 16),
    ],
)
def test_machine_code_of_few_tokens(sass_of: SassOf, dtype: str, num_groups: int, block_m: int) -> None:
    (kernel,) = kernels(
        "multiply", call(-1, 4096, 4096, num_groups, dtype=dtype), BLOCK_M=block_m, SPLIT=True
    )
    sass = sass_of(kernel, 90)
    assert sass.spills == sass.stack_bytes == 0
    loop = sass.main_loop
    assert loop.count("HGMMA") == loop.tensor_core_instructions == 8
    # Each thread's share of a block is 64 values, or 32 pairs, and comes in two loads of 16 bytes. Whatever
    # else is loaded is kept in flight like them: one stage, while another is being used.
    assert loop.wide_loads >= 2
    assert loop.count("LDG") == 0
    assert loop.groups_in_flight >= loop.committed_groups > 0
    # One of each for a pair is what dequantization should need: no conversions, few permutations.
    assert loop.count("I2F", "I2FP", "F2I", "I2I", "F2F") == 0
    assert loop.count("PRMT") <= 16
    assert loop.count("HADD2") <= 32 + 4
    assert len(loop.instructions) <= {0: 300, 128: 320, 64: 400, 32: 560}[dict(kernel.constants)["GROUP"]]


@pytest.mark.parametrize("block_n", [128, 256])
def test_machine_code_of_many_tokens(sass_of: SassOf, block_n: int) -> None:
    (kernel,) = kernels("matmul", call(-1, 14336, 4096, 32), BLOCK_N=block_n)
    sass = sass_of(kernel, 90)
    assert sass.spills == sass.stack_bytes == 0
    loop = sass.main_loop
    assert loop.count("HGMMA") == loop.tensor_core_instructions == 4
    assert loop.narrow_loads == 0
    assert loop.groups_in_flight >= 2 * loop.committed_groups > 0
    assert sass.count("STG.128") > 0
    assert sass.count("STG") == sass.count("STG.128")

    (kernel,) = kernels("dequantize", call(-1, 14336, 4096, 32))
    sass = sass_of(kernel, 90)
    assert sass.count("LDG.128") == 2  # the block
    assert sass.count("STG") == sass.count("STG.128") == 8
    assert sass.spills == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile(kernel_compiler: Executor, arch: int) -> None:
    shapes = call(-1, 4096, 4096, 128, bias=True, perm=True)
    # Of few tokens' kernels the one that takes most registers and shared memory.
    chosen = {kernel for kernel in choices(shapes, arch) if kernel.function != "multiply"}
    for kernel in chosen.union(kernels("multiply", shapes, arch, BLOCK_M=64, SPLIT=True)):
        compiled = kernel_compiler.submit(compile_kernel, kernel, arch).result()
        if arch == 80 and dict(kernel.constants).get("BLOCK_N") != launch.WIDE:
            assert compiled.entry.shared_bytes <= max_shared_bytes(86)  # which runs the same machine code

"""Fp8Gemm's kernels and its function body, against its reference; and the kernels' machine code."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness.onnx_body import model_of, run_body
from kernel_harness.sass import Sass

from trtforge.errors import PluginError
from trtforge.plugins.bundle import ARCHS, arch_for
from trtforge.plugins.fp8_gemm.cases import ABSOLUTE, CASES, RELATIVE, exact_inputs, random_inputs
from trtforge.plugins.fp8_gemm.launch import MAX_SPLITS, choices, plan
from trtforge.plugins.fp8_gemm.op import ACTIVATIONS, SCALES, scale_shape
from trtforge.plugins.fp8_gemm.reference import fp8_gemm
from trtforge.plugins.function_bodies import add_function_bodies
from trtforge.plugins.launch import Call, Gpu, Kernel
from trtforge.plugins.operators import OPERATORS

OPERATOR = OPERATORS["Fp8Gemm"]
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
H100, A100 = Gpu(90, 132), Gpu(80, 108)
Interpret = Callable[..., tuple[np.ndarray, ...]]
SassOf = Callable[[Kernel, int], Sass]


# A100 has no e4m3: kernels that multiply 16 bits; and each GPU with another dtype.
@pytest.mark.parametrize(("gpu", "dtype"), [(H100, BF16), (A100, np.float16)], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_the_bits_of_the_reference_where_nothing_is_rounded(
    interpret: Interpret, case: str, gpu: Gpu, dtype: type
) -> None:
    inputs = exact_inputs(CASES[case], dtype, E4M3)
    (y,) = interpret(OPERATOR, inputs, CASES[case].attributes, gpu)
    np.testing.assert_array_equal(y, fp8_gemm(**inputs, **CASES[case].attributes))


@pytest.mark.parametrize(("gpu", "dtype"), [(H100, np.float16), (A100, BF16)], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("case", ["split", "blocks", "static", "dynamic", "dynamic-blocks"])
def test_kernels_round_no_more_than_the_reference(
    interpret: Interpret, case: str, gpu: Gpu, dtype: type
) -> None:
    inputs = random_inputs(CASES[case], dtype, E4M3)
    (y,) = interpret(OPERATOR, inputs, CASES[case].attributes, gpu)
    expected = fp8_gemm(**inputs, **CASES[case].attributes)
    relative = RELATIVE[expected.dtype.name]
    np.testing.assert_allclose(
        y.astype(np.float32), expected.astype(np.float32), rtol=relative, atol=ABSOLUTE
    )


@pytest.mark.parametrize("case", CASES)
def test_body_equals_reference(case: str) -> None:
    for make_inputs in (exact_inputs, random_inputs):
        inputs = make_inputs(CASES[case], np.float32, E4M3)
        (y,) = run_body(OPERATOR, inputs, CASES[case].attributes)
        expected = fp8_gemm(**inputs, **CASES[case].attributes)
        np.testing.assert_allclose(y, expected, rtol=RELATIVE["float32"], atol=ABSOLUTE)


def test_a_body_without_an_input_before_another() -> None:
    case = CASES["static-blocks"]
    inputs = exact_inputs(case, np.float32, E4M3)
    assert "bias" not in inputs
    model = add_function_bodies(model_of(OPERATOR, inputs, case.attributes))
    (node,), (function,) = model.graph.node, model.functions
    assert list(node.input) == list(function.input) == ["x", "weight", "scale", "x_scale"]


@pytest.mark.parametrize("case", ["dynamic", "dynamic-blocks"])
def test_reference_equals_torch(case: str) -> None:
    inputs = random_inputs(CASES[case], np.float32, E4M3)
    x, weight, scale, bias = (inputs[name] for name in ("x", "weight", "scale", "bias"))
    size = 128 if case == "dynamic-blocks" else x.shape[1]
    groups = torch.from_numpy(x).split(size, dim=1)
    scales = [torch.where(g.abs().amax(1, True) > 0, g.abs().amax(1, True) / 448, 1) for g in groups]
    rounded = [(g / s).to(torch.float8_e4m3fn).float() * s for g, s in zip(groups, scales, strict=True)]
    rows, columns = (128, 128) if case == "dynamic-blocks" else (1, x.shape[1])
    scale_of_each = torch.from_numpy(scale).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    wide = torch.from_numpy(weight.astype(np.float32)) * scale_of_each[: weight.shape[0], : weight.shape[1]]
    expected = torch.nn.functional.linear(torch.cat(rounded, 1), wide, torch.from_numpy(bias))
    y = fp8_gemm(**inputs, **CASES[case].attributes)
    np.testing.assert_allclose(y, expected.numpy(), rtol=RELATIVE["float32"], atol=ABSOLUTE)


@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_every_e4m3_is_multiplied_as_it_is(interpret: Interpret, dtype: type) -> None:
    values = np.arange(256, dtype=np.uint8).view(E4M3)
    weight = values[~np.isnan(values.astype(np.float32))][:, None].repeat(16, 1)
    inputs = {"x": np.eye(1, 16).astype(dtype), "weight": weight, "scale": np.ones((1, 1), np.float32)}
    (y,) = interpret(OPERATOR, inputs, {"scales": "tensor"}, H100)
    np.testing.assert_array_equal(y[0], weight[:, 0].astype(dtype))


def test_every_float16_is_rounded_to_the_nearest_e4m3(interpret: Interpret) -> None:
    x = np.arange(2**15, dtype=np.uint16).view(np.float16).reshape(64, 512)
    x = np.where(np.isfinite(x), x, 0) * np.float16([1, -1] * 256)
    inputs = {
        "x": x,
        "weight": np.eye(512).astype(E4M3),
        "scale": np.ones((1, 1), np.float32),
        "x_scale": np.ones(1, np.float32),
    }
    (y,) = interpret(OPERATOR, inputs, {"scales": "tensor", "activation": "static"}, H100)
    np.testing.assert_array_equal(y, np.clip(x, -448, 448).astype(E4M3).astype(np.float16))


def call(
    num_tokens: int,
    out_features: int,
    in_features: int,
    scales: str = "channel",
    activation: str = "none",
    bias: bool = False,
) -> Call:
    shapes = {
        "x": (num_tokens, in_features),
        "weight": (out_features, in_features),
        "scale": scale_shape(scales, out_features, in_features),
    }
    dtypes = {"x": "bfloat16", "weight": "float8_e4m3fn", "scale": "float32"}
    if bias:
        shapes["bias"], dtypes["bias"] = (out_features,), "bfloat16"
    if activation == "static":
        shapes["x_scale"], dtypes["x_scale"] = (1,), "float32"
    return Call(shapes, dtypes, {"scales": scales, "activation": activation})


@settings(max_examples=300, deadline=None)
@given(
    num_tokens=st.integers(0, 20_000),
    out_features=st.integers(1, 130_000),
    in_features=st.integers(1, 4_000).map(lambda n: 16 * n),
    scales=st.sampled_from(SCALES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    arch=st.sampled_from([86, *ARCHS]),
    num_sms=st.integers(1, 200),
)
def test_plans_are_made_of_kernels_that_were_chosen_in_advance(
    num_tokens: int,
    out_features: int,
    in_features: int,
    scales: str,
    activation: str,
    bias: bool,
    arch: int,
    num_sms: int,
) -> None:
    sizes = (out_features, in_features, scales, activation, bias)
    chosen = choices(call(-1, *sizes), arch_for(arch))
    assert len(set(chosen)) == len(chosen) == len({kernel.name for kernel in chosen})
    gpu = Gpu(arch, num_sms)
    planned = plan(call(num_tokens, *sizes), gpu)
    for launch in planned.launches:
        assert launch.kernel in chosen
        assert all(0 <= size < 2**31 for size in launch.grid)
        assert max(launch.grid[1:]) < 2**16
    # The splits cover all steps, and what they write fits.
    gemm = next(launch for launch in planned.launches if launch.kernel.function == "gemm")
    constants = dict(gemm.kernel.constants)
    splits, steps = gemm.grid[2], -(-in_features // constants["BLOCK_K"])
    assert splits <= MAX_SPLITS
    assert (
        (splits - 1) * gemm.arguments["steps_per_split"] < steps <= splits * gemm.arguments["steps_per_split"]
    )
    if splits > 1:
        assert planned.workspace["partial"] >= 4 * splits * num_tokens * out_features
    # A plan for more tokens has room for fewer.
    more = plan(call(num_tokens + num_tokens // 3 + 1, *sizes), gpu)
    assert all(more.workspace[name] >= size for name, size in planned.workspace.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (1, 72), "weight": (64, 72)}, "72 in_features, which is no multiple of 16"),
        ({"weight": (64, 80)}, r"weight \(64, 80\) does not fit x \(1, 64\)"),
        ({"scale": (1, 1)}, r"scale has shape \(1, 1\), expected \(64, 1\)"),
        ({"x_scale": (1,)}, "x_scale with the activation static and no other"),
        ({"scales": "row"}, "no scales 'row', only tensor, channel, block"),
        ({"activation": "int8"}, "no activation 'int8'"),
        ({"activation": "static"}, "x_scale not given"),
        ({"dtype": "float32"}, "x float16 or bfloat16"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(changes: dict, message: str) -> None:
    given = call(1, 64, 64)
    shapes = {**given.shapes, **{name: shape for name, shape in changes.items() if isinstance(shape, tuple)}}
    attributes = {name: changes.get(name, value) for name, value in given.attributes.items()}
    dtypes = {**given.dtypes, "x": changes.get("dtype", "bfloat16")}
    for refuse in (lambda c: plan(c, H100), lambda c: choices(c, 90)):
        with pytest.raises(PluginError, match=message):
            refuse(Call(shapes, dtypes, attributes))


def gemm_of(num_tokens: int, scales: str, activation: str, arch: int) -> Kernel:
    """The kernel that multiplies for Llama-3.1-8B's q_proj."""
    launches = plan(call(num_tokens, 4096, 4096, scales, activation), Gpu(arch, 132)).launches
    return next(launch.kernel for launch in launches if launch.kernel.function == "gemm")


@pytest.mark.parametrize("scales", ["channel", "block"])
@pytest.mark.parametrize("num_tokens", [1, 2048])
def test_16bit_machine_code_on_hopper(sass_of: SassOf, num_tokens: int, scales: str) -> None:
    kernel = gemm_of(num_tokens, scales, "none", 90)
    sass = sass_of(kernel, 90)
    assert sass.spills == sass.stack_bytes == 0
    loop, constants = sass.main_loop, dict(kernel.constants)
    threads = 32 * kernel.num_warps
    weights = constants["BLOCK_N"] * constants["BLOCK_K"] // threads  # of a thread in a step
    assert loop.tensor_core_instructions == loop.count("HGMMA") > 0
    assert loop.wide_loads * 16 == weights
    assert loop.groups_in_flight >= 4  # two steps, each of weights and of tokens
    # Per two weights at most one permutation, and few instructions in all; none that converts.
    assert loop.count("F2F", "F2FP", "I2F", "I2FP") == 0
    assert loop.opcodes["PRMT"] <= weights // 2
    if num_tokens == 1:
        assert len(loop.instructions) < 5 * weights


@pytest.mark.parametrize("scales", ["channel", "block"])
@pytest.mark.parametrize("num_tokens", [1, 2048])
def test_fp8_machine_code_on_hopper(sass_of: SassOf, num_tokens: int, scales: str) -> None:
    kernel = gemm_of(num_tokens, scales, "dynamic", 90)
    sass = sass_of(kernel, 90)
    assert sass.spills == sass.stack_bytes == 0
    loop, constants = sass.main_loop, dict(kernel.constants)
    # Partial sums of one step leave the tensor cores before the next: 128 inputs at the most.
    assert constants["BLOCK_K"] == 128
    assert loop.tensor_core_instructions == loop.count("QGMMA") == 4 * constants["BLOCK_N"] // 64
    operands = (constants["BLOCK_N"] + constants["BLOCK_T"]) * constants["BLOCK_K"]
    assert loop.wide_loads * 16 * 32 * kernel.num_warps == operands
    assert loop.groups_in_flight >= (4 if num_tokens == 1 else 2)
    assert loop.count("F2F", "F2FP", "I2F", "I2FP", "PRMT") == 0


@pytest.mark.parametrize("arch", [80, 89, 100, 120])
@pytest.mark.parametrize(
    ("num_tokens", "scales", "activation"),
    [(1, "block", "dynamic"), (2048, "block", "dynamic"), (2048, "channel", "none")],
)
def test_machine_code_on_other_gpus(
    sass_of: SassOf, arch: int, num_tokens: int, scales: str, activation: str
) -> None:
    sass = sass_of(gemm_of(num_tokens, scales, activation, arch), arch)
    assert sass.spills == sass.stack_bytes == 0
    assert sass.main_loop.tensor_core_instructions > 0
    assert sass.main_loop.groups_in_flight >= 2


@pytest.mark.parametrize("scales", ["channel", "block"])
def test_quantizing_loads_16_bytes_at_once(sass_of: SassOf, scales: str) -> None:
    (quantize,) = [
        kernel
        for kernel in choices(call(-1, 4096, 4096, scales, "dynamic"), 90)
        if kernel.function.startswith("quantize")
    ]
    sass = sass_of(quantize, 90)
    assert sass.spills == sass.narrow_loads == 0 < sass.wide_loads

"""Triton's interpreter as these tests run it: float types as on the hardware, memory kept within bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_harness.onnx_body import run_body
from kernel_harness.scaled_add.op import OPERATOR, scaled_add
from triton.runtime.errors import InterpreterError

from trtforge.plugins.launch import Call, Gpu, Kernels, Plan
from trtforge.plugins.operators import OPERATORS

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
TORCH_TYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.uint8): torch.uint8,
    np.dtype(BF16): torch.bfloat16,
    np.dtype(E4M3): torch.float8_e4m3fn,
}
# Every value of a type of 16 or 8 bits.
ALL_BF16 = np.arange(2**16, dtype=np.uint16).view(BF16)
ALL_FP16 = np.arange(2**16, dtype=np.uint16).view(np.float16)
ALL_E4M3 = np.arange(2**8, dtype=np.uint8).view(E4M3)
# Values that lie halfway between two of bf16, and beside it; magnitudes far below and above e4m3's.
_POWERS = 2.0 ** np.arange(-20, 20, dtype=np.float32)
_TIES = (np.float32([1, 3, 5, 7, -9])[:, None] * _POWERS).ravel().view(np.uint32) | np.uint32(0x7FFF)
_EDGES = np.float32([0, -0.0, 448, 463.9, 464, 465, 1e30, -1e30, np.inf, -np.inf, np.nan, 2**-9, 2**-10])
FLOATS = np.concatenate([*((_TIES + offset).view(np.float32) for offset in np.uint32([0, 1, 2])), _EDGES])
RNG = np.random.default_rng(0)


def tensor(array: np.ndarray) -> torch.Tensor:
    data = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
    return data.view(TORCH_TYPES[array.dtype]).reshape(array.shape)


def call(
    kernel: Callable, dtype: type, shape: tuple[int, ...], *inputs: np.ndarray, **constants: int
) -> np.ndarray:
    """What `kernel(out, *inputs)` writes to an output of this dtype and shape."""
    out = tensor(np.zeros(shape, dtype))
    kernel[(1,)](out, *map(tensor, inputs), **constants)
    return np.frombuffer(out.view(torch.uint8).numpy().tobytes(), dtype).reshape(shape)


def normal(*shape: int, dtype: type = BF16) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def assert_same_numbers(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, but for what kind of NaN it is."""
    assert got.dtype == expected.dtype
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint8), expected[~nan].view(np.uint8))


@triton.jit
def cast(out, x, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, tl.load(x + index).to(out.dtype.element_ty))


def run_cast(values: np.ndarray, dtype: type) -> np.ndarray:
    padded = np.resize(values, triton.next_power_of_2(values.size))
    return call(cast, dtype, padded.shape, padded, N=padded.size)[: values.size]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (FLOATS, BF16),
        (ALL_FP16, BF16),
        (ALL_BF16, np.float32),
        (ALL_BF16, np.float16),
        (ALL_E4M3, np.float32),
        (ALL_E4M3, np.float16),
        (ALL_E4M3, BF16),
        (FLOATS, np.float16),
    ],
)
def test_casts_round_to_nearest_even(values: np.ndarray, dtype: type) -> None:
    assert_same_numbers(run_cast(values, dtype), _of_torch(values, dtype))


def _of_torch(values: np.ndarray, dtype: type) -> np.ndarray:
    converted = tensor(values).to(TORCH_TYPES[np.dtype(dtype)])
    return np.frombuffer(converted.view(torch.uint8).numpy().tobytes(), dtype)


@pytest.mark.parametrize("values", [FLOATS, ALL_BF16, ALL_FP16])
def test_casts_to_e4m3_saturate(values: np.ndarray) -> None:
    in_range = np.clip(values.astype(np.float32), -448, 448)
    assert_same_numbers(run_cast(values, E4M3), _of_torch(in_range, E4M3))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_bf16_to_and_from_integers(dtype: type) -> None:
    whole = np.arange(0, 200, dtype=dtype)
    assert_same_numbers(run_cast(whole, BF16), whole.astype(np.float32).astype(BF16))
    np.testing.assert_array_equal(run_cast(np.float32([0, 1.5, 127.9]).astype(BF16), dtype), [0, 1, 128])


@triton.jit
def dot(out, a, b, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    product = tl.dot(tl.load(a + m[:, None] * K + k), tl.load(b + k[:, None] * N + n))
    tl.store(out + m[:, None] * N + n, product)


@pytest.mark.parametrize("dtype", [BF16, E4M3, np.float16])
def test_dot_accumulates_in_float32(dtype: type) -> None:
    a, b = normal(16, 64, dtype=dtype), normal(64, 32, dtype=dtype)
    got = call(dot, np.float32, (16, 32), a, b, M=16, K=64, N=32)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@triton.jit
def arithmetic(out, x, y, N: tl.constexpr):
    index = tl.arange(0, N)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(out + index, a * b)
    tl.store(out + N + index, a + b)
    tl.store(out + 2 * N + index, a - b)
    tl.store(out + 3 * N + index, (a / b).to(out.dtype.element_ty))
    tl.store(out + 4 * N + index, -a)
    tl.store(out + 5 * N + index, tl.abs(a))
    tl.store(out + 6 * N + index, a * 2.0 + 0.3)


def test_bf16_arithmetic_is_that_of_float32_rounded_once() -> None:
    a, b = normal(256), normal(256)
    got = call(arithmetic, BF16, (7, 256), a, b, N=256)
    x, y = a.astype(np.float32), b.astype(np.float32)
    twice = (x * 2).astype(BF16).astype(np.float32) + np.float32(0.3).astype(BF16).astype(np.float32)
    expected = [x * y, x + y, x - y, x / y, -x, np.abs(x), twice]
    assert_same_numbers(got, np.stack([row.astype(BF16) for row in expected]))


@triton.jit
def compare(out, x, y, N: tl.constexpr):
    index = tl.arange(0, N)
    a, b = tl.load(x + index), tl.load(y + index)
    tl.store(out + index, tl.where(a < b, a, b))
    tl.store(out + N + index, tl.maximum(a, b))
    tl.store(out + 2 * N + index, tl.minimum(a, b))
    tl.store(out + 3 * N + index, (a >= b).to(out.dtype.element_ty))
    tl.store(out + 4 * N + index, tl.zeros([N], out.dtype.element_ty) + tl.max(a, 0).to(out.dtype.element_ty))
    tl.store(out + 5 * N + index, tl.where(a == b, 0.1, -0.1).to(out.dtype.element_ty))


def test_bf16_comparisons_see_numbers_and_not_bits() -> None:
    a, b = normal(256), normal(256)
    b[::4] = a[::4]
    got = call(compare, BF16, (6, 256), a, b, N=256)
    x, y = a.astype(np.float32), b.astype(np.float32)
    least = np.minimum(x, y)
    expected = [least, np.maximum(x, y), least, x >= y, np.full(256, x.max()), np.where(x == y, 0.1, -0.1)]
    assert_same_numbers(got, np.stack([row.astype(np.float32).astype(BF16) for row in expected]))


@triton.jit
def reduce_rows(out, x, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    rows = tl.load(x + m[:, None] * N + n)
    tl.store(out + m, tl.max(rows, 1))
    tl.store(out + M + m, tl.sum(rows.to(tl.float32), 1))
    tl.store(out + 2 * M + m, tl.sum(tl.trans(rows).to(tl.float32), 0))
    tl.store(out + 3 * M + m, tl.max(tl.reshape(rows, [M, N // 2, 2]).to(tl.float32), 2).max(1))


def test_bf16_rows_are_reduced_by_value() -> None:
    x = normal(8, 32)
    got = call(reduce_rows, np.float32, (4, 8), x, M=8, N=32)
    wide = x.astype(np.float32)
    np.testing.assert_allclose(
        got, [wide.max(1), wide.sum(1), wide.sum(1), wide.max(1)], rtol=1e-5, atol=1e-6
    )


@triton.jit
def bitcasts(out, x, N: tl.constexpr):
    index = tl.arange(0, N)
    bits = tl.load(x + index).to(tl.int16, bitcast=True)
    tl.store(out + index, (bits ^ -0x8000).to(tl.bfloat16, bitcast=True))


@triton.jit
def e4m3_from_bits(out, x, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, tl.load(x + index).to(tl.float8e4nv, bitcast=True).to(tl.float32))


def test_bits_become_numbers_and_back() -> None:
    x = normal(64)
    assert_same_numbers(call(bitcasts, BF16, (64,), x, N=64), -x)
    bits = np.arange(256, dtype=np.uint8)
    assert_same_numbers(call(e4m3_from_bits, np.float32, (256,), bits, N=256), ALL_E4M3.astype(np.float32))


@triton.jit
def masked(out, x, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out + index, tl.load(x + index, mask=index < 10, other=1.25))


@pytest.mark.parametrize("dtype", [BF16, E4M3, np.float32])
def test_what_a_mask_leaves_out_is_never_read(dtype: type) -> None:
    x = normal(16, dtype=dtype)
    expected = np.concatenate([x[:10], np.full(6, 1.25, dtype)])
    assert_same_numbers(call(masked, dtype, (16,), x, N=16), expected)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(3, 7), (0, 7), (40, 512)])
def test_an_operator_is_planned_and_run(interpret: Callable, dtype: type, shape: tuple[int, int]) -> None:
    total, x = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    before = total.copy()
    (got,) = interpret(OPERATOR, {"total": total, "x": x}, {"scale": 0.5})
    assert_same_numbers(got, scaled_add(total, x, scale=0.5))
    assert_same_numbers(total, before)  # the tests' own arrays are as they were


def test_the_operator_s_body_is_what_its_kernels_compute(
    interpret: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "ScaledAdd", OPERATOR)
    inputs = {"total": normal(3, 7, dtype=np.float16), "x": normal(3, 7, dtype=np.float16)}
    (expected,) = interpret(OPERATOR, inputs, {"scale": 0.5})
    (got,) = run_body(OPERATOR, inputs, {"scale": 0.5})
    assert_same_numbers(got, expected)


def _with_plan(change: Callable[[Plan], Plan]) -> object:
    """The test operator with another plan."""
    kernels = OPERATOR.kernels
    assert kernels is not None

    def plan(call: Call, gpu: Gpu) -> Plan:
        return change(kernels.plan(call, gpu))

    return replace(OPERATOR, kernels=Kernels(plan, kernels.choices))


def _with_arguments(plan: Plan, **arguments: str | int) -> Plan:
    (launch,) = plan.launches
    return replace(plan, launches=(replace(launch, arguments={**launch.arguments, **arguments}),))


@pytest.mark.parametrize("beyond", [1, 96])
def test_a_kernel_that_leaves_its_memory_is_found(interpret: Callable, beyond: int) -> None:
    inputs = {"total": normal(4, 8), "x": normal(4, 8)}
    broken = _with_plan(lambda plan: _with_arguments(plan, num_elements=32 + beyond))
    message = rf"{beyond} of {32 + beyond} addresses are outside of all buffers; .* has 64 bytes"
    with pytest.raises(InterpreterError, match=message):
        interpret(broken, inputs, {})


def test_a_kernel_that_changes_its_input_is_found(interpret: Callable) -> None:
    broken = _with_plan(lambda plan: _with_arguments(plan, total="x"))
    with pytest.raises(AssertionError, match="ScaledAdd wrote to its input x"):
        interpret(broken, {"total": normal(4, 8), "x": normal(4, 8)}, {})


def test_a_workspace_holds_nothing_useful_before(interpret: Callable) -> None:
    reading = _with_plan(lambda plan: replace(_with_arguments(plan, x="scratch"), workspace={"scratch": 64}))
    (got,) = interpret(reading, {"total": normal(4, 8), "x": normal(4, 8)}, {})
    assert np.isnan(got.astype(np.float32)).all()

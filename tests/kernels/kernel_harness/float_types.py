"""bf16 and e4m3 in Triton's interpreter, computed as the hardware does.

As it comes, the interpreter computes with the bits of both as if they were integers, and truncates where the
hardware rounds. Here numpy gets their true types, of ml_dtypes: arithmetic is that of float32, rounded once.

What still differs from a GPU: a product and its sum are rounded separately where the compiler makes one fma
of them, and float32 operands of a dot are not cut to tf32.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_TYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn)}
_BITS = {"bf16": tl.uint16, "fp8e4nv": tl.uint8}
_E4M3_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)

_original_np_dtype = interpreter._get_np_dtype
_original_dot = InterpreterBuilder.create_dot
_original_load = InterpreterBuilder.create_masked_load
_original_store = InterpreterBuilder.create_masked_store


def install() -> None:
    """Change the interpreter of this process; doing it again changes nothing."""
    interpreter._get_np_dtype = _np_dtype
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _convert
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_masked_load = _load
    InterpreterBuilder.create_masked_store = _store


def _np_dtype(dtype: Any) -> np.dtype:
    return _TYPES.get(dtype.scalar.name) or _original_np_dtype(dtype)


def _cast(builder: InterpreterBuilder, source: TensorHandle, dtype: Any) -> TensorHandle:
    """Round to nearest even; e4m3 saturates, as cvt.satfinite does, where ml_dtypes would give NaN."""
    data = source.data
    if dtype.scalar == tl.float8e4nv:
        data = np.clip(data.astype(np.float32), -_E4M3_MAX, _E4M3_MAX)
    with np.errstate(invalid="ignore", over="ignore"):  # float16 overflows to infinity, NaN stays NaN
        return TensorHandle(data.astype(_np_dtype(dtype)), dtype.scalar)


def _convert(builder: InterpreterBuilder, source: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
    return _cast(builder, source, dtype)


def _dot(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *options: Any
) -> TensorHandle:
    return _original_dot(builder, _widen(a), _widen(b), accumulator, *options)


def _widen(handle: TensorHandle) -> TensorHandle:
    if handle.data.dtype in _TYPES.values():
        return TensorHandle(handle.data.astype(np.float32), tl.float32)
    return handle


def _load(
    builder: InterpreterBuilder,
    pointers: TensorHandle,
    mask: TensorHandle,
    other: TensorHandle | None,
    *options: Any,
) -> TensorHandle:
    element = pointers.get_element_ty()
    if element.name not in _TYPES:
        return _original_load(builder, pointers, mask, other, *options)
    bits = _original_load(
        builder, _to_bits(pointers), mask, None if other is None else _as_bits(other), *options
    )
    return TensorHandle(bits.data.view(_TYPES[element.name]), element)


def _store(
    builder: InterpreterBuilder,
    pointers: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    *options: Any,
) -> Any:
    return _original_store(builder, _to_bits(pointers), _as_bits(value), mask, *options)


# Triton's own loads and stores know no types but numpy's.
def _to_bits(pointers: TensorHandle) -> TensorHandle:
    bits = _BITS.get(pointers.get_element_ty().name)
    return pointers if bits is None else TensorHandle(pointers.data, tl.pointer_type(bits))


def _as_bits(value: TensorHandle) -> TensorHandle:
    bits = _BITS.get(value.dtype.scalar.name)
    return value if bits is None else TensorHandle(value.data.view(_original_np_dtype(bits)), bits)

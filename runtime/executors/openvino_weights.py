"""Quantized weights and activations of the graph as OpenVINO's CPU plugin takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import openvino.opset13 as ops

from trtforge.runtime.executors.openvino_passes import is_constant

_FP8_BLOCK_SIZE = 128
_EXPANDED_ROWS = 256  # at a time, for little memory


def quantization_converter(multiply_integers: bool) -> Callable[[Any], list[Any]]:
    """Converts ONNX's QuantizeLinear of activations to int8 with one scale, and the DequantizeLinear behind.

    Both are one FakeQuantize, from which the plugin makes products of integers; or, without
    `multiply_integers`, arithmetic in which it recognizes none.
    """

    def convert(context: Any) -> list[Any]:
        x, scale = context.get_input(0), float(context.get_input(1).get_node().data)
        if multiply_integers:
            low, high = (ops.constant(np.float32(number * scale)) for number in (-128, 127))
            return [ops.fake_quantize(x, low, high, low, high, 256).output(0)]
        step = ops.constant(np.float32(scale))
        rounded = ops.clamp(ops.round(ops.divide(x, step), "half_to_even"), -128, 127)
        return [ops.multiply(rounded, step).output(0)]

    return convert


def dequantization_converter(is_bfloat16: bool) -> Callable[[Any], list[Any]]:
    """Converts ONNX's DequantizeLinear of weights [out, in], with scales of the whole, rows or blocks.

    Integers stay as they are in memory: the plugin multiplies by them. It does so with no 8-bit floats, which
    become what the graph computes in, once, here.
    """

    def convert(context: Any) -> list[Any]:
        if not is_constant(context.get_input(0)):
            return [context.get_input(0)]  # activations: see `quantization_converter`
        weight, scales = context.get_input(0).get_node(), context.get_input(1).get_node()
        if weight.get_output_element_type(0) == ov.Type.f8e4m3:
            return [_expand_fp8(weight, scales, is_bfloat16).output(0)]
        zeros = context.get_input(2).get_node() if context.get_input_size() > 2 else None
        out = _dequantize_integers(weight, scales, zeros)
        return [(ops.convert(out, "bf16") if is_bfloat16 else out).output(0)]

    return convert


def _dequantize_integers(weight: Any, scales: Any, zeros: Any) -> Any:
    """The chain of operators that the plugin recognizes."""
    out_features, in_features = weight.get_output_shape(0)
    num_groups = scales.data.size // out_features
    if num_groups == 1:
        shape = [out_features, in_features]
    else:
        shape = [out_features, num_groups, in_features // num_groups]
    scale_shape = [*shape[:-1], 1]
    out = ops.convert(_reshaped(weight, shape), "f32")
    if zeros is not None:
        out = ops.subtract(out, ops.convert(_reshaped(zeros, scale_shape), "f32"))
    out = ops.multiply(out, ops.constant(scales.data.reshape(scale_shape)))
    if num_groups > 1:
        out = ops.reshape(out, ops.constant(np.array([out_features, in_features])), False)
    return out


def _reshaped(constant: Any, shape: list[int]) -> Any:
    return ops.reshape(constant, ops.constant(np.array(shape)), False)


def _expand_fp8(weight: Any, scales: Any, to_bfloat16: bool) -> Any:
    """The weight as a constant of bfloat16 or float32."""
    out_features, in_features = weight.get_output_shape(0)
    bits, scale = weight.data.view(np.uint8), scales.data
    if scale.ndim < 2:  # of the whole weight or of its rows
        scale = np.broadcast_to(scale.reshape(-1, 1), (out_features, 1))
    expanded = np.empty((out_features, in_features), np.uint16 if to_bfloat16 else np.float32)
    for start in range(0, out_features, _EXPANDED_ROWS):
        rows = slice(start, start + _EXPANDED_ROWS)
        by_column = scale[rows]
        if by_column.shape[1] > 1:
            by_column = np.repeat(by_column, _FP8_BLOCK_SIZE, axis=1)[:, :in_features]
        values = _E4M3_VALUES[bits[rows]] * by_column
        expanded[rows] = _round_to_bfloat16(values) if to_bfloat16 else values
    if not to_bfloat16:
        return ops.constant(expanded)
    # numpy has no bfloat16: the same bits are given as float16.
    tensor = ov.Tensor(expanded.view(np.float16), ov.Shape(expanded.shape), ov.Type.bf16)
    return ops.constant(tensor, shared_memory=False)


def _round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16, the even one of two."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _e4m3_values() -> npt.NDArray[np.float32]:
    """The number that each byte stands for: sign, four bits of exponent, three of mantissa."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7) / 8
    magnitude = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    magnitude[bits & 127 == 127] = np.nan
    return np.where(bits < 128, magnitude, -magnitude).astype(np.float32)


_E4M3_VALUES = _e4m3_values()

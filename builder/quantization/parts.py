"""The tensors that a quantized weight has in the graph. They are made while they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtforge.builder.quantization.policy import Lowering
from trtforge.builder.quantization.weights import (
    AffineInt4Weight,
    Fp8Weight,
    Int8Weight,
    QuantizedLinear,
    QuantizedWeight,
)
from trtforge.errors import ExportError
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK, scale_shape
from trtforge.plugins.int4_gemm.op import packed_shape
from trtforge.plugins.int4_gemm.packing import Int4Weight, pack
from trtforge.plugins.op import Array

VALUES, SCALES, ZEROS, PERM, INPUT_SCALE = "", "_scale", "_zero_point", "_perm", "_input_scale"
X_SCALE = "_x_scale"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a weight; its name is the weight's and the part's key."""

    dtype: ir.DataType
    shape: tuple[int, ...]


def declare_parts(linear: QuantizedLinear, lowering: Lowering, dtype: ir.DataType) -> dict[str, Part]:
    """The tensors of a weight in a graph that computes in `dtype`, in the order in which they are stored."""
    out_features, in_features = linear.shape
    if linear.format == "int4":
        num_groups = in_features // (linear.group_size or in_features)
        if linear.has_float_zeros:
            grouped = (out_features, num_groups, in_features // num_groups)
            floats = Part(ir.DataType.FLOAT, (out_features, num_groups, 1))
            parts = {VALUES: Part(ir.DataType.UINT4, grouped), SCALES: floats, ZEROS: floats}
        elif lowering == "plugin":
            parts = {
                VALUES: Part(ir.DataType.INT32, packed_shape(*linear.shape)),
                SCALES: Part(dtype, (num_groups, out_features, 2)),
            }
        else:
            parts = {
                VALUES: Part(ir.DataType.UINT4, linear.shape),
                SCALES: Part(ir.DataType.FLOAT, (out_features, num_groups)),
                ZEROS: Part(ir.DataType.UINT4, (out_features, num_groups)),
            }
        if linear.has_perm:
            parts[PERM] = Part(ir.DataType.INT32, (in_features,))
    elif linear.format == "fp8":
        kind = linear.scales
        shape = _native_scale_shape(linear) if lowering == "native" else scale_shape(kind, *linear.shape)
        parts = {VALUES: Part(ir.DataType.FLOAT8E4M3FN, linear.shape), SCALES: Part(ir.DataType.FLOAT, shape)}
    else:
        groups = () if linear.group_size is None else (in_features // linear.group_size,)
        parts = {
            VALUES: Part(ir.DataType.INT8, linear.shape),
            SCALES: Part(ir.DataType.FLOAT, (out_features, *groups)),
        }
    if linear.read_input_scale is not None:
        parts[INPUT_SCALE] = Part(dtype, (in_features,))
    if linear.read_x_scale is not None:
        parts[X_SCALE] = Part(ir.DataType.FLOAT, (1,) if lowering == "plugin" else ())
    return parts


def _native_scale_shape(linear: QuantizedLinear) -> tuple[int, ...]:
    """DequantizeLinear knows a scale, one a row, or blocks along one axis."""
    out_features, in_features = linear.shape
    if linear.scales == "tensor":
        return ()
    if linear.scales == "channel":
        return (out_features,)
    return out_features, -(-in_features // SCALE_BLOCK)


def make_parts(
    linear: QuantizedLinear, lowering: Lowering, dtype: ir.DataType
) -> dict[str, ir.TensorProtocol]:
    """Read the weight: the data of what `declare_parts` declares.

    Raises ExportError if a part cannot hold it.
    """
    weight = linear.read()
    arrays = _native_arrays(linear, weight) if lowering == "native" else _plugin_arrays(weight, dtype)
    if linear.read_input_scale is not None:
        arrays[INPUT_SCALE] = linear.read_input_scale().astype(dtype.numpy())
    if linear.read_x_scale is not None:
        arrays[X_SCALE] = linear.read_x_scale()
    tensors = {}
    for key, part in declare_parts(linear, lowering, dtype).items():
        array = np.ascontiguousarray(arrays[key]).reshape(part.shape)
        if part.dtype == ir.DataType.UINT4:
            tensors[key] = ir.PackedTensor(pack_nibbles(array), part.dtype, shape=part.shape)
        else:
            tensors[key] = ir.Tensor(array, dtype=part.dtype)
    return tensors


def _native_arrays(linear: QuantizedLinear, weight: QuantizedWeight) -> dict[str, Array]:
    if isinstance(weight, Int4Weight):
        if weight.zeros.max(initial=0) > 15:
            raise ExportError(
                f"a weight of {list(linear.shape)} has a zero point of 16, which four bits do not hold: only "
                "runtimes with this project's operators can have it"
            )
        scales = weight.scales.astype(np.float32)
        arrays: dict[str, Array] = {VALUES: weight.values, SCALES: scales, ZEROS: weight.zeros}
        return arrays if weight.perm is None else arrays | {PERM: weight.perm}
    if isinstance(weight, AffineInt4Weight):
        return {VALUES: weight.values, SCALES: weight.scale, ZEROS: weight.zero}
    if isinstance(weight, Fp8Weight) and weight.scales == "block":
        return {VALUES: weight.values, SCALES: weight.row_scale()}
    return {VALUES: weight.values, SCALES: weight.scale}


def _plugin_arrays(weight: QuantizedWeight, dtype: ir.DataType) -> dict[str, Array]:
    if isinstance(weight, Int4Weight):
        packed = pack(weight, dtype.numpy())
        arrays = {VALUES: packed["weight"], SCALES: packed["scales"]}
        return arrays if weight.perm is None else arrays | {PERM: packed["perm"]}
    if isinstance(weight, Int8Weight | AffineInt4Weight):
        raise ExportError(f"there is no operator of this project for {type(weight).__name__}")
    return {VALUES: weight.values, SCALES: weight.scale}


def pack_nibbles(values: Array) -> Array:
    """Two values a byte, the first in the low half; one half of the last byte may be unused."""
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: Array = flat[::2] | (flat[1::2] << 4)
    return packed


class LatestParts:
    """Makes the parts of one weight at a time: they are written one after the other, and asked for so."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._parts: Mapping[str, ir.TensorProtocol] = {}

    def tensor(
        self, name: str, key: str, part: Part, make: Callable[[], Mapping[str, ir.TensorProtocol]]
    ) -> ir.LazyTensor:
        """The tensor `name` + `key`, whose data `make`, with that of the weight's other parts, returns."""

        def read() -> ir.TensorProtocol:
            if self._name != name:
                self._name, self._parts = None, {}  # not two at once
                self._parts, self._name = make(), name
            return self._parts[key]

        return ir.LazyTensor(read, dtype=part.dtype, shape=ir.Shape(part.shape), name=name + key)

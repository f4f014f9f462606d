"""Quantized weights of a layer's experts, which are read one expert at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.builder.quantization.weights import (
    AffineInt4Weight,
    Int8Weight,
    QuantizedFormat,
    QuantizedLinear,
    QuantizedWeight,
)
from trtforge.errors import ExportError
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK
from trtforge.plugins.int4_gemm.packing import Int4Weight
from trtforge.plugins.op import Array

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeight:
    """The weight of one expert, in whatever format: (values - zero) * scale, by groups of input features."""

    values: Array  # [out, in]: 0 to 15 as uint8, ml_dtypes.float8_e4m3fn, or int8
    scale: Float32Array  # [out, groups]
    zero: npt.NDArray[np.uint8] | None = None  # [out, groups]; of four bits

    @classmethod
    def of(cls, weight: QuantizedWeight) -> ExpertWeight:
        """The same numbers. Raises ExportError for a weight whose groups are none of neighbours."""
        if isinstance(weight, AffineInt4Weight) or (
            isinstance(weight, Int4Weight) and weight.perm is not None
        ):
            raise ExportError(f"an expert's weight cannot be a {type(weight).__name__} of this kind")
        if isinstance(weight, Int4Weight):
            return cls(weight.values, weight.scales.astype(np.float32), weight.zeros)
        if isinstance(weight, Int8Weight):
            return cls(weight.values, weight.scale)
        scale = weight.row_scale()
        if weight.scales == "block":
            in_features = weight.values.shape[1]
            group_size = _block_columns(in_features)
            scale = np.repeat(scale, SCALE_BLOCK // group_size, axis=1)[:, : in_features // group_size]
        return cls(weight.values, scale)

    def dequantize(self) -> Float32Array:
        """What the weight stands for, [out, in]."""
        wide = self.values.astype(np.float32)
        by_column = self.values.shape[1] // self.scale.shape[1]
        if self.zero is not None:
            wide -= np.repeat(self.zero.astype(np.float32), by_column, axis=1)
        return wide * np.repeat(self.scale, by_column, axis=1)


@dataclass(frozen=True, slots=True)
class QuantizedExperts:
    """The quantized weights of all experts of a layer, and what a graph has to know about them first."""

    format: QuantizedFormat
    shape: tuple[int, int, int]  # as the model has it: [experts, out, in], transposed [experts, in, out]
    transposed: bool
    group_size: int  # input features that share a scale
    source: str  # where the numbers are from, in words
    read: Callable[[int], ExpertWeight]  # of the expert with this number

    @property
    def in_axis(self) -> int:
        """The axis of `shape` that input features are along."""
        return in_axis(self.transposed)

    @property
    def in_features(self) -> int:
        """Input features of each expert."""
        return self.shape[self.in_axis]

    def dequantize(self) -> Float32Array:
        """What the weights stand for, of `shape`."""
        result = np.empty(self.shape, np.float32)
        for number, expert in enumerate(result):
            wide = self.read(number).dequantize()
            expert[:] = wide.T if self.transposed else wide
        return result


def in_axis(transposed: bool) -> int:
    """The axis of experts' weights that input features are along."""
    return 1 if transposed else 2


def join_experts(name: str, experts: Sequence[Sequence[QuantizedLinear]]) -> QuantizedExperts:
    """The weights `name` of `experts`, whose rows are those of each one's parts, such as gate and up.

    Numbers and scales stay what they are. Raises ExportError for parts that are quantized in different ways,
    or so that a stack of experts has no place for it.
    """
    linears = [linear for parts in experts for linear in parts]
    (first, *_) = linears
    layouts = {(linear.format, linear.shape[1], _columns_of_scale(linear)) for linear in linears}
    reason = None
    if len(layouts) > 1:
        reason = "they are quantized in different ways"
    elif any(linear.has_perm for linear in linears):
        reason = "their input features have an order of their own (desc_act)"
    elif any(linear.read_input_scale is not None for linear in linears):
        reason = "their inputs have scales (pre_quant_scale)"
    if reason is not None:
        raise ExportError(f"{name}: the experts in the checkpoint are not supported: {reason}")
    out_features = sum(part.shape[0] for part in experts[0])

    def read(number: int) -> ExpertWeight:
        parts = [ExpertWeight.of(linear.read()) for linear in experts[number]]
        zeros = [part.zero for part in parts if part.zero is not None]
        return ExpertWeight(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.scale for part in parts]),
            np.concatenate(zeros) if zeros else None,
        )

    return QuantizedExperts(
        format=first.format,
        shape=(len(experts), out_features, first.shape[1]),
        transposed=False,
        group_size=_columns_of_scale(first),
        source=first.source,
        read=read,
    )


def _columns_of_scale(linear: QuantizedLinear) -> int:
    in_features = linear.shape[1]
    if linear.format == "fp8" and linear.scales == "block":
        return _block_columns(in_features)
    return linear.group_size or in_features


def _block_columns(in_features: int) -> int:
    """Blocks of scales as groups that divide the input features: of a last block that is not whole too."""
    return math.gcd(SCALE_BLOCK, in_features)

"""Quantized weights of projections as numbers and scales, whatever they were made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trtforge.errors import PluginError
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK, scale_shape
from trtforge.plugins.int4_gemm.packing import Int4Weight
from trtforge.plugins.op import Array

QuantizedFormat = Literal["int4", "fp8", "int8"]
ScaleKind = Literal["tensor", "channel", "block"]


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A weight [out, in] of e4m3: values * scale. Raises PluginError if the shapes do not fit together."""

    values: Array  # [out, in], ml_dtypes.float8_e4m3fn
    scale: npt.NDArray[np.float32]  # [1, 1], [out, 1] or [ceil(out / 128), ceil(in / 128)]
    scales: ScaleKind

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.scale.shape != scale_shape(self.scales, *self.values.shape):
            raise PluginError(
                f"values {self.values.shape} and scales {self.scale.shape} of kind {self.scales!r} do not "
                "fit together"
            )

    def row_scale(self) -> npt.NDArray[np.float32]:
        """The scales with a row for each row of values: [out, 1] or, of blocks, [out, ceil(in / 128)]."""
        out_features = self.values.shape[0]
        if self.scales == "block":
            return np.repeat(self.scale, SCALE_BLOCK, axis=0)[:out_features]
        return np.broadcast_to(self.scale, (out_features, 1))

    def dequantize(self) -> npt.NDArray[np.float32]:
        """What the weight stands for, [out, in]."""
        scale = self.row_scale()
        if self.scales == "block":
            scale = np.repeat(scale, SCALE_BLOCK, axis=1)[:, : self.values.shape[1]]
        return self.values.astype(np.float32) * scale


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """A weight [out, in] of signed bytes: values * scale. Raises PluginError if the shapes do not fit."""

    values: npt.NDArray[np.int8]  # [out, in]
    scale: npt.NDArray[np.float32]  # [out, 1]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.scale.shape != (self.values.shape[0], 1):
            raise PluginError(f"values {self.values.shape} and scales {self.scale.shape} do not fit together")

    def dequantize(self) -> npt.NDArray[np.float32]:
        """What the weight stands for, [out, in]."""
        return self.values.astype(np.float32) * self.scale


QuantizedWeight = Int4Weight | Fp8Weight | Int8Weight


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A quantized weight that can be read, again and again, and what a graph has to know about it first."""

    format: QuantizedFormat
    shape: tuple[int, int]  # [out, in]
    source: str  # where its numbers are from, in words
    read: Callable[[], QuantizedWeight]
    group_size: int | None = None  # of int4
    scales: ScaleKind = "channel"  # of fp8
    has_perm: bool = False  # of int4
    # [in], float32: what inputs are multiplied by before the weight.
    read_input_scale: Callable[[], Array] | None = None

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weight [out, in] that does the same to inputs as they are."""
        weight = self.read().dequantize()
        return weight if self.read_input_scale is None else weight * self.read_input_scale()

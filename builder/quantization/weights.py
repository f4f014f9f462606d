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
# Where the scale of rounded activations is from: known before, or that of each token's largest magnitude.
ActivationScheme = Literal["dynamic", "static"]


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
    """A weight [out, in] of signed bytes: values * scale, by groups of columns.

    Raises PluginError if the shapes do not fit.
    """

    values: npt.NDArray[np.int8]  # [out, in]
    scale: npt.NDArray[np.float32]  # [out, groups]

    def __post_init__(self) -> None:
        _check_groups(self.values, self.scale)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """What the weight stands for, [out, in]."""
        return self.values.astype(np.float32) * _by_column(self.scale, self.values)


@dataclass(frozen=True, slots=True, eq=False)
class AffineInt4Weight:
    """A weight [out, in] in four bits whose zero points are no whole numbers: (values - zero) * scale.

    Raises PluginError if the shapes do not fit.
    """

    values: npt.NDArray[np.uint8]  # [out, in], 0 to 15
    scale: npt.NDArray[np.float32]  # [out, groups]
    zero: npt.NDArray[np.float32]  # [out, groups]

    def __post_init__(self) -> None:
        _check_groups(self.values, self.scale)
        _check_groups(self.values, self.zero)

    @classmethod
    def of_offsets(
        cls,
        values: npt.NDArray[np.uint8],
        scale: npt.NDArray[np.float32],
        offset: npt.NDArray[np.float32],
    ) -> AffineInt4Weight:
        """The weight values * scale + offset; groups without a scale are all offset."""
        is_flat = scale == 0
        values = np.where(_by_column(is_flat, values), np.uint8(1), values)
        scale = np.where(is_flat, offset, scale)
        zero = np.where(is_flat | (scale == 0), 0, -offset / np.where(scale == 0, 1, scale))
        return cls(values, scale, zero.astype(np.float32))

    def dequantize(self) -> npt.NDArray[np.float32]:
        """What the weight stands for, [out, in]."""
        centered = self.values.astype(np.float32) - _by_column(self.zero, self.values)
        return centered * _by_column(self.scale, self.values)


def _check_groups(values: Array, of_groups: Array) -> None:
    fits = values.ndim == of_groups.ndim == 2 and len(values) == len(of_groups)
    if not fits or of_groups.shape[1] == 0 or values.shape[1] % of_groups.shape[1]:
        raise PluginError(f"values {values.shape} and scales {of_groups.shape} do not fit together")


def _by_column(of_groups: Array, values: Array) -> Array:
    """[out, groups] -> [out, in] of `values`."""
    return np.repeat(of_groups, values.shape[1] // of_groups.shape[1], axis=1)


QuantizedWeight = Int4Weight | AffineInt4Weight | Fp8Weight | Int8Weight


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A quantized weight that can be read, again and again, and what a graph has to know about it first."""

    format: QuantizedFormat
    shape: tuple[int, int]  # [out, in]
    source: str  # where its numbers are from, in words
    read: Callable[[], QuantizedWeight]
    group_size: int | None = None  # of int4 and int8; None: a row is one group
    scales: ScaleKind = "channel"  # of fp8
    has_perm: bool = False  # of int4
    has_float_zeros: bool = False  # of int4: AffineInt4Weight
    # [in], float32: what inputs are multiplied by before the weight.
    read_input_scale: Callable[[], Array] | None = None
    # How inputs are rounded to the weight's format, fp8 or int8; None: they are not.
    activations: ActivationScheme | None = None
    read_x_scale: Callable[[], Array] | None = None  # [], float32: what one is in rounded static activations

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weight [out, in] that does the same to inputs as they are."""
        weight = self.read().dequantize()
        return weight if self.read_input_scale is None else weight * self.read_input_scale()


@dataclass(frozen=True, slots=True)
class ComputedWeight:
    """A weight of floats that are computed from what a checkpoint stores, each time it is read."""

    shape: tuple[int, ...]
    reason: str  # why it is not quantized, in words
    dequantize: Callable[[], npt.NDArray[np.float32]]

"""The layout in which Int4Gemm's weight is stored: made when a model is built, read by kernels as it is.

A thread of the kernel loads 16 bytes of one row, and a shift and a mask of a word yield two neighbouring
columns in the two halves of a register, where adding a constant turns them into floating point numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.errors import PluginError
from trtforge.plugins.int4_gemm.op import CHUNK, STEP, TILE, WORDS, group_size, packed_shape
from trtforge.plugins.op import Array

SYMMETRIC_ZERO = 8  # the zero point of weights that have none of their own


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """A weight [out, in] in four bits: (values - zeros) * scales, the last two by groups of columns.

    Raises PluginError if the shapes do not fit together or a number is out of range.
    """

    values: npt.NDArray[np.uint8]  # [out, in], 0 to 15
    scales: Array  # [out, groups], floating point
    zeros: npt.NDArray[np.uint8]  # [out, groups], 0 to 16
    perm: npt.NDArray[np.int32] | None = None  # [in]: column k stands for input perm[k]; None: for k

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.scales.ndim != 2 or self.scales.shape[1] == 0:
            raise PluginError(
                f"Int4Gemm: values {self.values.shape} and scales {self.scales.shape} must have two dims"
            )
        out_features, in_features = self.values.shape
        group_size(in_features, self.scales.shape[1])
        if self.scales.shape[0] != out_features or self.zeros.shape != self.scales.shape:
            raise PluginError(
                f"Int4Gemm: values {self.values.shape}, scales {self.scales.shape} and zeros "
                f"{self.zeros.shape} do not fit together"
            )
        if self.values.max(initial=0) > 15 or self.zeros.max(initial=0) > 16:
            raise PluginError(
                f"Int4Gemm: values must be 0 to 15 and zeros 0 to 16, not up to {self.values.max(initial=0)} "
                f"and {self.zeros.max(initial=0)}"
            )
        if self.perm is not None and not np.array_equal(np.sort(self.perm), np.arange(in_features)):
            raise PluginError(f"Int4Gemm: perm is no permutation of {in_features} columns")

    def dequantize(self) -> npt.NDArray[np.float32]:
        """What the weight stands for, [out, in], with inputs in their own order."""
        by_column = self.values.shape[1] // self.scales.shape[1]
        zeros = np.repeat(self.zeros.astype(np.float32), by_column, axis=1)
        scales = np.repeat(self.scales.astype(np.float32), by_column, axis=1)
        weight = (self.values - zeros) * scales
        if self.perm is None:
            return weight
        ordered = np.empty_like(weight)
        ordered[:, self.perm] = weight
        return ordered


def pack(weight: Int4Weight, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Int4Gemm's inputs `weight`, `scales` and, if there is one, `perm`; scales are rounded to `dtype`."""
    packed = {
        "weight": pack_values(weight.values),
        "scales": np.stack([weight.scales.T.astype(dtype), weight.zeros.T.astype(dtype)], axis=2),
    }
    return packed if weight.perm is None else packed | {"perm": weight.perm.astype(np.int32)}


def unpack(weight: Array, scales: Array, perm: Array | None, in_features: int) -> Int4Weight:
    """The inverse of `pack`, for as many columns as the operator's x has."""
    return Int4Weight(
        values=unpack_values(weight, scales.shape[1], in_features),
        scales=scales[:, :, 0].T,
        zeros=scales[:, :, 1].T.astype(np.uint8),
        perm=perm,
    )


def pack_values(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """[out, in] of 0 to 15 -> [tiles, steps, TILE, WORDS]. Rows and columns of padding are zeros."""
    tiles, steps, _, _ = packed_shape(*values.shape)
    padded = np.zeros((tiles * TILE, steps * STEP), np.uint8)
    padded[: values.shape[0], : values.shape[1]] = values
    # tile, row, step, shift, word, half
    blocks = padded.reshape(tiles, TILE, steps, STEP // CHUNK, WORDS, 2)
    words = np.zeros((tiles, TILE, steps, WORDS), np.uint32)
    for shift in range(STEP // CHUNK):
        for half in range(2):
            nibbles = blocks[:, :, :, shift, :, half].astype(np.uint32)
            words |= nibbles << np.uint32(4 * shift + 16 * half)
    return np.ascontiguousarray(words.transpose(0, 2, 1, 3)).view(np.int32)


def unpack_values(
    weight: npt.NDArray[np.int32], out_features: int, in_features: int
) -> npt.NDArray[np.uint8]:
    """[tiles, steps, TILE, WORDS] -> [out, in].

    Raises PluginError if that is not the shape of such a weight.
    """
    if weight.shape != packed_shape(out_features, in_features):
        raise PluginError(
            f"Int4Gemm: a weight of {out_features} x {in_features} is stored as "
            f"{packed_shape(out_features, in_features)}, not {weight.shape}"
        )
    tiles, steps, _, _ = weight.shape
    words = weight.view(np.uint32).transpose(0, 2, 1, 3)
    blocks = np.empty((tiles, TILE, steps, STEP // CHUNK, WORDS, 2), np.uint8)
    for shift in range(STEP // CHUNK):
        for half in range(2):
            blocks[:, :, :, shift, :, half] = (words >> np.uint32(4 * shift + 16 * half)) & 15
    return blocks.reshape(tiles * TILE, steps * STEP)[:out_features, :in_features]

"""Blocks of GGUF files as quantized weights, without rounding again.

A row of a tensor is a sequence of blocks, each with 16-bit scales and its numbers. Layouts: the format's
specification, and for _K the comments of ggml's block types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from trtforge.builder.quantization.weights import (
    AffineInt4Weight,
    Int8Weight,
    QuantizedFormat,
    QuantizedWeight,
)
from trtforge.plugins.int4_gemm.packing import SYMMETRIC_ZERO, Int4Weight

Bytes = npt.NDArray[np.uint8]

GROUP_SIZE = 32  # numbers that share a scale, in all kinds that are kept
_K_GROUPS = 8  # groups of a block of 256 numbers


def _q8_0(blocks: Bytes) -> Int8Weight:
    """[rows, blocks, 34]: a scale, 32 signed bytes."""
    values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return Int8Weight(values.reshape(len(blocks), -1), _halves(blocks, 0))


def _q4_0(blocks: Bytes) -> Int4Weight:
    """[rows, blocks, 18]: a scale, 16 bytes of two numbers plus 8."""
    scales = _halves(blocks, 0)
    zeros = np.full(scales.shape, SYMMETRIC_ZERO, np.uint8)
    return Int4Weight(_nibbles(blocks[..., 2:]).reshape(len(blocks), -1), scales, zeros)


def _q4_1(blocks: Bytes) -> AffineInt4Weight:
    """[rows, blocks, 20]: a scale, the smallest number, 16 bytes of two numbers."""
    values = _nibbles(blocks[..., 4:]).reshape(len(blocks), -1)
    return AffineInt4Weight.of_offsets(values, _halves(blocks, 0), _halves(blocks, 2))


def _q4_k(blocks: Bytes) -> AffineInt4Weight:
    """[rows, blocks, 144]: scales of the scales and of the minima; eight of each in six bits; 128 bytes.

    Byte i of 32 has a number of one group in its low half and of the next group in its high half.
    """
    rows = len(blocks)
    packed = blocks[..., 4:16]
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=-1)
    scale = _halves(blocks, 0)[..., None] * scales
    offset = -_halves(blocks, 2)[..., None] * minima
    pairs = blocks[..., 16:].reshape(rows, -1, _K_GROUPS // 2, GROUP_SIZE)
    values = np.stack([pairs & 15, pairs >> 4], axis=3).reshape(rows, -1)
    return AffineInt4Weight.of_offsets(values, scale.reshape(rows, -1), offset.reshape(rows, -1))


def _halves(blocks: Bytes, start: int) -> npt.NDArray[np.float32]:
    """The float16 at byte `start` of each block."""
    pairs = np.ascontiguousarray(blocks[..., start : start + 2])
    return pairs.view(np.float16)[..., 0].astype(np.float32)


def _nibbles(pairs: Bytes) -> Bytes:
    """[..., 16] bytes -> [..., 32]: all low halves come first."""
    return np.concatenate([pairs & 15, pairs >> 4], axis=-1)


_UNPACK: Mapping[str, tuple[QuantizedFormat, int, Callable[[Bytes], QuantizedWeight]]] = {
    "Q8_0": ("int8", 34, _q8_0),
    "Q4_0": ("int4", 18, _q4_0),
    "Q4_1": ("int4", 20, _q4_1),
    "Q4_K": ("int4", 144, _q4_k),
}
HAS_FLOAT_ZEROS = ("Q4_1", "Q4_K")


def format_of(kind: str) -> QuantizedFormat | None:
    """What tensors of the type `kind` become; None for one that has to be dequantized."""
    return _UNPACK[kind][0] if kind in _UNPACK else None


def unpack_blocks(kind: str, rows: Bytes) -> QuantizedWeight:
    """The weight whose rows, [out, bytes], are blocks of a type that `format_of` knows."""
    _, block_bytes, unpack = _UNPACK[kind]
    return unpack(rows.reshape(len(rows), -1, block_bytes))

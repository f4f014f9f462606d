"""The part of a weight that one rank keeps, as pieces of the checkpoint's files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from trtforge.builder.checkpoint import TensorEntry
from trtforge.builder.columns import Columns
from trtforge.builder.quantization import slices
from trtforge.builder.quantization.experts import QuantizedExperts
from trtforge.builder.quantization.weights import QuantizedLinear
from trtforge.builder.sharding.cut import Ranges, length
from trtforge.builder.sharding.split import Range
from trtforge.builder.weights import IR_DTYPES, Division, WeightSource


def take(source: WeightSource, axis: int, ranges: Ranges) -> WeightSource:
    """What of the weight is in `ranges` along `axis`. Nothing is read.

    Raises ConfigError if weights that share a scale would be parted.
    """
    shape = (*source.shape[:axis], length(ranges), *source.shape[axis + 1 :])
    stored = source.quantized
    if isinstance(stored, QuantizedLinear):
        return replace(source, shape=shape, quantized=slices.take(source.name, stored, axis, ranges))
    if isinstance(stored, QuantizedExperts):
        return replace(source, shape=shape, quantized=slices.take_experts(source.name, stored, axis, ranges))
    source = replace(source, division=Division(source, axis, ranges))
    if 0 < axis == len(shape) - 1:  # a few bytes of each row
        return replace(source, shape=shape, columns=Columns(source.shape[axis], ranges))
    if stored is not None:
        return replace(source, shape=shape, quantized=slices.take_computed(stored, axis, ranges))
    return replace(source, shape=shape, pieces=tuple(_pieces(source, _elements(source.shape, axis, ranges))))


def _elements(shape: tuple[int, ...], axis: int, ranges: Ranges) -> Iterator[Range]:
    """Of the weight's elements in C order those that are taken, ascending."""
    inner = math.prod(shape[axis + 1 :])
    for outer in range(math.prod(shape[:axis])):
        for start, stop in ranges:
            yield (outer * shape[axis] + start) * inner, (outer * shape[axis] + stop) * inner


def _pieces(source: WeightSource, elements: Iterator[Range]) -> Iterator[TensorEntry]:
    ends: list[Range] = []  # of each piece, in elements
    for piece in source.pieces:
        begin = ends[-1][1] if ends else 0
        ends.append((begin, begin + piece.nbytes // _element_bytes(piece)))
    number = 0
    for start, stop in elements:
        while ends[number][1] <= start:
            number += 1
        for piece, (begin, end) in zip(source.pieces[number:], ends[number:], strict=True):
            if begin >= stop:
                break
            first, last = max(start, begin), min(stop, end)
            size = _element_bytes(piece)
            yield TensorEntry(
                piece.file,
                piece.dtype,
                (last - first,),
                piece.offset + (first - begin) * size,
                (last - first) * size,
            )


def _element_bytes(piece: TensorEntry) -> int:
    return int(IR_DTYPES[piece.dtype].itemsize)

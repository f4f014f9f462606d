"""How a model is to be deployed: what memory and time depend on besides the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trtforge.builder.planning.gpus import Gpu
from trtforge.manifest import Limits

WeightFormatName = Literal["16-bit", "fp8", "fp8-weight-only", "int4"]
KVFormatName = Literal["16-bit", "fp8", "int8"]


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the weights of matmuls are stored, and what multiplies them."""

    bits: int
    scale_bytes: int = 0  # of what one group has besides its numbers
    group_sizes: tuple[int, ...] = ()  # input features that share a scale; empty: all of them do
    tile: tuple[int, int] = (1, 1)  # output and input features that sizes are padded to, but of experts
    uses_fp8_matmul: bool = False

    def group_size(self, in_features: int) -> int | None:
        """The largest group that divides `in_features`; None if weights of that size cannot be stored so."""
        if not self.group_sizes:
            return in_features
        return next((size for size in self.group_sizes if in_features % size == 0), None)

    def data_bytes(self, out_features: int, in_features: int, *, has_tiles: bool = True) -> int:
        """Bytes of one weight without its scales; that of an expert has no tiles."""
        rows, columns = self.tile if has_tiles else (1, 1)
        padded = math.ceil(out_features / rows) * rows * math.ceil(in_features / columns) * columns
        return math.ceil(padded * self.bits / 8)

    def scales_bytes(self, out_features: int, in_features: int, group_size: int) -> int:
        """Bytes of the scales of one weight."""
        return out_features * math.ceil(in_features / group_size) * self.scale_bytes


WEIGHT_FORMATS: Mapping[WeightFormatName, WeightFormat] = {
    "16-bit": WeightFormat(bits=16),
    "fp8": WeightFormat(bits=8, scale_bytes=4, uses_fp8_matmul=True),  # a float32 for each output feature
    "fp8-weight-only": WeightFormat(bits=8, scale_bytes=4),
    # A scale and a zero point of 16 bits for each group.
    "int4": WeightFormat(bits=4, scale_bytes=4, group_sizes=(128, 64, 32), tile=(64, 128)),
}

# Bytes of a cached number. Quantized caches have a scale for all keys of a layer and one for all values.
KV_ELEMENT_BYTES: Mapping[KVFormatName, int] = {"16-bit": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class Deployment:
    """One way to deploy a model."""

    gpu: Gpu
    tp: int
    pp: int
    weights: WeightFormatName
    kv_cache: KVFormatName
    limits: Limits
    block_size: int  # tokens
    memory_fraction: float  # of the GPU's memory that may be used
    efficiency: float  # of the GPU's rates that is reached; 1: the roofline

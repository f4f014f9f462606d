"""Quantized weights of experts in torch, of which one is expanded when its expert is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from trtforge.errors import ConfigError
from trtforge.runtime.executors.torch_operation import Attributes, Operation

_NUM_DIMS = 3
_KNOWN = "which the reference runtime does not know: only that of experts, in blocks and without zero points"


@dataclass(frozen=True, slots=True)
class DequantizedExperts:
    """values * scales, by blocks along one axis. Nothing is computed before an expert is asked for."""

    values: Tensor  # [E, rows, columns] of int8 or e4m3; uint8 [E, rows, columns / 2]: two of four bits each
    scales: Tensor  # [E, rows, columns] but for the axis, which has one for each block
    axis: int  # 1 or 2
    block_size: int

    def __getitem__(self, expert: int) -> Tensor:
        """[rows, columns] of the type that the scales have."""
        values, scales = self.values[expert], self.scales[expert]
        if values.dtype == torch.uint8:
            values = _unpack(values)
        axis = self.axis - 1
        by_element = scales.repeat_interleave(self.block_size, dim=axis)
        return values.to(scales.dtype) * by_element


ExpertWeights: TypeAlias = Tensor | DequantizedExperts  # both are indexed by experts


def _unpack(pairs: Tensor) -> Tensor:
    """[rows, columns / 2] of two signed numbers a byte, the first in the low half -> int8 [rows, columns]."""
    low, high = (pairs << 4).view(torch.int8) >> 4, pairs.view(torch.int8) >> 4
    return torch.stack([low, high], dim=-1).flatten(-2)


def dequantize_linear(attributes: Attributes, device: torch.device) -> Operation:
    """DequantizeLinear of experts' weights, in blocks and without zero points: other forms are not known."""
    axis, block_size = attributes.get("axis", 1), attributes.get("block_size", 0)
    if not block_size:
        raise ConfigError(f"the graph has a DequantizeLinear along axis {axis}, {_KNOWN}")

    def dequantize(values: Tensor, scales: Tensor, zeros: Tensor | None = None) -> DequantizedExperts:
        if values.ndim != _NUM_DIMS or zeros is not None:
            raise ConfigError(f"the graph has a DequantizeLinear of {values.ndim} dims, {_KNOWN}")
        return DequantizedExperts(values, scales, axis, block_size)

    return dequantize

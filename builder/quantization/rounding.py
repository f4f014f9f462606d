"""Rounds weights to fewer bits, without data: each weight on its own, to the nearest number.

Tensors are worked on a few rows at a time, so that what is computed stays in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import torch

from trtforge.builder.quantization.weights import Fp8Weight, Int8Weight, QuantizedFormat, QuantizedWeight
from trtforge.errors import ExportError
from trtforge.plugins.fp8_gemm.op import E4M3_MAX
from trtforge.plugins.int4_gemm.packing import Int4Weight

_MAX_CODE = 15
_INT8_MAX = 127.0
_CHUNK_ELEMENTS = 1 << 17
# Parts of a group's range that are tried for its scale. A narrower range rounds most weights more finely
# and cuts the largest.
_RANGES = tuple(1 - 0.03 * step for step in range(11))
# Factors of a row's scale that are tried for e4m3. Twice the scale would round to the same numbers, but where
# each number lies between its neighbours is different for each scale on the way there.
_FP8_FACTORS = tuple(2 ** (step / 8) for step in range(8))


def round_weight(
    name: str, weight: torch.Tensor, wanted: QuantizedFormat, group_size: int | None
) -> QuantizedWeight:
    """The weight `name`, [out, in] of any float type, as `wanted`; int4 has groups of `group_size` columns.

    Raises ExportError for a weight that has infinities or NaN.
    """
    if not torch.isfinite(weight).all():
        raise ExportError(f"{name} has infinities or NaN, which cannot be stored as {wanted}")
    if wanted == "int4":
        return _round_int4(weight, group_size or weight.shape[1])
    return _round_fp8(weight) if wanted == "fp8" else _round_int8(weight)


def _round_int4(weight: torch.Tensor, group_size: int) -> Int4Weight:
    """Values 0 to 15 with the scale, of those tried, whose group has the smallest sum of squared errors."""
    out_features, in_features = weight.shape
    num_groups = in_features // group_size
    values = np.empty((out_features, in_features), np.uint8)
    scales = np.empty((out_features, num_groups), np.float32)
    zeros = np.empty((out_features, num_groups), np.uint8)
    for rows, chunk in _chunks(weight):
        codes, scale, zero = _search_scale(chunk.reshape(-1, num_groups, group_size))
        values[rows] = codes.to(torch.uint8).reshape(-1, in_features).numpy()
        scales[rows] = scale.squeeze(2).numpy()
        zeros[rows] = zero.to(torch.uint8).squeeze(2).numpy()
    return Int4Weight(values, scales, zeros)


def _search_scale(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero point of groups [..., group_size]; the last two have one column."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)  # zero is always within the range
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / _MAX_CODE
    step[step == 0] = 1
    zero = (-low / step).round_()
    units = groups / step
    best_error = torch.full_like(step, torch.inf)
    best_part = torch.ones_like(step)
    for part in _RANGES:
        levels = (units * (1 / part)).round_().clamp_(-zero, _MAX_CODE - zero)
        error = torch.linalg.vector_norm(levels.mul_(part).sub_(units), dim=-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_part.masked_fill_(better, part)
    codes = (units / best_part).round_().add_(zero).clamp_(0, _MAX_CODE)
    return codes, step * best_part, zero


def _round_fp8(weight: torch.Tensor) -> Fp8Weight:
    """Each row with the scale, of those tried, that makes the sum of its squared errors smallest.

    With the first of them the row's largest magnitude becomes e4m3's, with the others less.
    """
    values = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty((weight.shape[0], 1), np.float32)
    for rows, chunk in _chunks(weight):
        smallest = _scale(chunk, E4M3_MAX)
        best_scale, best_error = smallest, torch.full_like(smallest, torch.inf)
        for factor in _FP8_FACTORS:
            scale = smallest * factor
            rounded = _to_e4m3(chunk, scale).float().mul_(scale)
            error = torch.linalg.vector_norm(rounded.sub_(chunk), dim=1, keepdim=True)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
        codes = _to_e4m3(chunk, best_scale)
        values[rows] = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        scales[rows] = best_scale.numpy()
    return Fp8Weight(values, scales, "channel")


def _to_e4m3(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (rows / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _round_int8(weight: torch.Tensor) -> Int8Weight:
    """Each row's largest magnitude becomes 127."""
    values = np.empty(weight.shape, np.int8)
    scales = np.empty((weight.shape[0], 1), np.float32)
    for rows, chunk in _chunks(weight):
        scale = _scale(chunk, _INT8_MAX)
        values[rows] = (chunk / scale).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8).numpy()
        scales[rows] = scale.numpy()
    return Int8Weight(values, scales)


def _scale(rows: torch.Tensor, largest: float) -> torch.Tensor:
    scale = rows.abs().amax(1, keepdim=True) / largest
    return torch.where(scale == 0, 1.0, scale)


def _chunks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A few rows at a time, as float32."""
    num_rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        yield rows, weight[rows].float()

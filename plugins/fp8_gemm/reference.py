"""Fp8Gemm, slow and obvious."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trtforge.errors import PluginError
from trtforge.plugins.fp8_gemm.op import E4M3_MAX, FP8_GEMM, SCALE_BLOCK, check_activation, scale_shape
from trtforge.plugins.op import Array


def fp8_gemm(
    x: Array,  # [T, in]
    weight: Array,  # e4m3 [out, in]
    scale: Array,  # float32 [1, 1], [out, 1] or [ceil(out / 128), ceil(in / 128)]
    bias: Array | None = None,  # [out]
    x_scale: Array | None = None,  # float32 [1]
    *,
    scales: str,
    activation: str = "none",
) -> Array:
    """y [T, out] in x's dtype, added up in float32.

    Raises PluginError for shapes that do not fit, and unless x_scale is given exactly for activation static.
    Source: blocks of 128 x 128 and 1 x 128 as in DeepSeek-V3 (arXiv 2412.19437).
    """
    sizes = FP8_GEMM.check_inputs(x, weight, scale, bias, x_scale)
    expected = scale_shape(scales, sizes["out_features"], sizes["in_features"])
    if scale.shape != expected:
        raise PluginError(
            f"Fp8Gemm: scale has shape {scale.shape}, expected {expected} for scales {scales!r}"
        )
    check_activation(activation, x_scale is not None)
    wide = x.astype(np.float32)
    if x_scale is not None:
        wide = _round(wide, x_scale, weight.dtype)
    elif activation == "dynamic":
        group = SCALE_BLOCK if scales == "block" else x.shape[1]
        for start in range(0, x.shape[1], group):
            part = wide[:, start : start + group]
            largest = np.abs(part).max(1, keepdims=True)
            part_scale = np.where(largest == 0, np.float32(1), largest / np.float32(E4M3_MAX))
            wide[:, start : start + group] = _round(part, part_scale, weight.dtype)
    y: Array = wide @ (weight.astype(np.float32) * _expand(scale, weight.shape)).T
    if bias is not None:
        y = y + bias.astype(np.float32)
    return y.astype(x.dtype)


def _round(x: Array, scale: Array, e4m3: npt.DTypeLike) -> Array:
    """float32 -> the nearest e4m3 times scale, as float32."""
    rounded: Array = np.clip(x / scale, -E4M3_MAX, E4M3_MAX).astype(e4m3).astype(np.float32) * scale
    return rounded


def _expand(scale: Array, shape: tuple[int, ...]) -> Array:
    """The scale of each weight, where sizes of 1 stand for all."""
    for axis, size in enumerate(shape):
        if scale.shape[axis] > 1:
            scale = scale.repeat(1 if scale.shape[axis] == size else SCALE_BLOCK, axis)
    return scale[: shape[0], : shape[1]]

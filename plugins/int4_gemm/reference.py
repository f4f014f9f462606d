"""Int4Gemm, slow and obvious."""

from __future__ import annotations

import numpy as np

from trtforge.plugins.int4_gemm.op import INT4_GEMM
from trtforge.plugins.int4_gemm.packing import unpack
from trtforge.plugins.op import Array


def int4_gemm(
    x: Array,  # [T, in]
    weight: Array,  # [tiles, steps, TILE, WORDS]
    scales: Array,  # [groups, out, 2]
    bias: Array | None = None,  # [out]
    perm: Array | None = None,  # [in]
) -> Array:
    """x @ dequantized weight^T + bias, [T, out], added up in float32.

    Raises PluginError for shapes that do not fit.
    """
    sizes = INT4_GEMM.check_inputs(x, weight, scales, bias, perm)
    dequantized = unpack(weight, scales, perm, sizes["in_features"]).dequantize()
    y = x.astype(np.float32) @ dequantized.T
    if bias is not None:
        y += bias.astype(np.float32)
    return y.astype(x.dtype)

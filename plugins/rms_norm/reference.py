"""AddRmsNorm, slow and obvious."""

from __future__ import annotations

import numpy as np

from trtforge.plugins.op import Array
from trtforge.plugins.rms_norm.op import ADD_RMS_NORM


def add_rms_norm(x: Array, residual: Array, weight: Array, *, eps: float) -> tuple[Array, Array]:
    """x and residual [T, hidden], weight [hidden] -> (y, h), both [T, hidden].

    Raises PluginError for shapes that do not fit. Source: RMSNorm (arXiv 1910.07467).
    """
    ADD_RMS_NORM.check_inputs(x, residual, weight)
    h = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    wide = h.astype(np.float32)
    mean = np.square(wide).mean(-1, keepdims=True)
    y: Array = wide / np.sqrt(mean + np.float32(eps)) * weight.astype(np.float32)
    return y.astype(x.dtype), h

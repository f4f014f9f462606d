"""QkNorm, slow and obvious."""

from __future__ import annotations

import numpy as np

from trtforge.plugins.op import Array
from trtforge.plugins.qk_norm.op import QK_NORM


def qk_norm(
    q: Array,  # [T, H, D]
    k: Array,  # [T, Hkv, D]
    q_weight: Array,  # [D]
    k_weight: Array,  # [D]
    *,
    eps: float,
    unit_offset: int = 0,
) -> tuple[Array, Array]:
    """(q, k) normalized. Raises PluginError for shapes that do not fit.

    Source: RMSNorm (arXiv 1910.07467), over heads as in Qwen3 (arXiv 2505.09388) and Gemma 3 (2503.19786).
    """
    QK_NORM.check_inputs(q, k, q_weight, k_weight)
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        wide = x.astype(np.float32)
        scale = weight.astype(np.float32) + np.float32(1 if unit_offset else 0)
        mean = np.square(wide).mean(-1, keepdims=True)
        y: Array = wide / np.sqrt(mean + np.float32(eps)) * scale
        results.append(y.astype(x.dtype))
    return results[0], results[1]

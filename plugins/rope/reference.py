"""Rope, slow and obvious."""

from __future__ import annotations

import numpy as np

from trtforge.plugins.op import Array
from trtforge.plugins.rope.op import ROPE, rotated_size


def rope(
    q: Array,  # [T, H, D]
    k: Array,  # [T, Hkv, D]
    cos: Array,  # [T, R / 2]
    sin: Array,  # [T, R / 2]
    *,
    interleaved: int = 0,
    rotary_dim: int = 0,
) -> tuple[Array, Array]:
    """(q, k) rotated. Raises PluginError for shapes that do not fit.

    Source: RoFormer (arXiv 2104.09864).
    """
    sizes = ROPE.check_inputs(q, k, cos, sin)
    size = rotated_size(sizes["head_dim"], sizes["num_pairs"], rotary_dim)
    first = slice(0, size, 2) if interleaved else slice(0, size // 2)
    second = slice(1, size, 2) if interleaved else slice(size // 2, size)
    c, s = (angle.astype(np.float32)[:, None] for angle in (cos, sin))
    results = []
    for x in (q, k):
        wide, out = x.astype(np.float32), x.copy()
        out[..., first] = (wide[..., first] * c - wide[..., second] * s).astype(x.dtype)
        out[..., second] = (wide[..., second] * c + wide[..., first] * s).astype(x.dtype)
        results.append(out)
    return results[0], results[1]

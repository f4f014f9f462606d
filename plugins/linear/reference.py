"""Linear, slow and obvious."""

from __future__ import annotations

import numpy as np

from trtforge.plugins.op import Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., in], weight [out, in], bias [out] -> [..., out], added up in float32."""
    y = x.astype(np.float32) @ weight.astype(np.float32).T
    if bias is not None:
        y += bias.astype(np.float32)
    return y.astype(x.dtype)

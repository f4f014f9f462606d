"""SiluMul, slow and obvious."""

from __future__ import annotations

import math

import numpy as np

from trtforge.plugins.op import Array
from trtforge.plugins.silu_mul.op import SILU_MUL, check_activation


def silu_mul(gate_up: Array, *, activation: str = "silu") -> Array:
    """gate_up [T, 2, intermediate] -> [T, intermediate].

    Raises PluginError for another shape and for an unknown activation.
    Source: SwiGLU and GEGLU (arXiv 2002.05202).
    """
    SILU_MUL.check_inputs(gate_up)
    check_activation(activation)
    gate, up = gate_up.astype(np.float64).swapaxes(0, 1)
    if activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = gate * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    y: Array = gate * up
    return y.astype(gate_up.dtype)

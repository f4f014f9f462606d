"""MoeExperts, slow and obvious."""

from __future__ import annotations

import math

import numpy as np

from trtforge.errors import PluginError
from trtforge.plugins.moe_experts.op import MOE_EXPERTS
from trtforge.plugins.op import Array


def moe_experts(
    x: Array,  # [T, hidden]
    router_indices: Array,  # [T, k]
    router_weights: Array,  # [T, k]
    gate_up: Array,  # [E, 2 * intermediate, hidden], with transposed [E, hidden, 2 * intermediate]
    down: Array,  # [E, hidden, intermediate], with transposed [E, intermediate, hidden]
    gate_up_bias: Array | None = None,  # [E, 2 * intermediate]
    down_bias: Array | None = None,  # [E, hidden]
    gate_up_offset: Array | None = None,  # [E, groups, 2 * intermediate]
    down_offset: Array | None = None,  # [E, groups, hidden]
    *,
    activation: str,
    transposed: int = 0,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Array:
    """What the chosen experts make of each token, weighted and added up: [T, hidden].

    Raises PluginError for shapes that do not fit and for an unknown activation.
    """
    biases, offsets = (gate_up_bias, down_bias), (gate_up_offset, down_offset)
    MOE_EXPERTS.check_inputs(x, router_indices, router_weights, gate_up, down, *biases, *offsets)
    out = np.zeros_like(x)
    for token, choices in enumerate(router_indices):
        for choice, expert in enumerate(choices):
            first, second = gate_up[expert], down[expert]
            if not transposed:
                first, second = first.T, second.T
            hidden = x[token] @ first
            if gate_up_offset is not None:
                hidden = hidden - _sum_groups(x[token], gate_up_offset[expert]) @ gate_up_offset[expert]
            if gate_up_bias is not None:
                hidden = hidden + gate_up_bias[expert]
            hidden = _activate(hidden, activation, alpha, limit)
            y = hidden @ second
            if down_offset is not None:
                y = y - _sum_groups(hidden, down_offset[expert]) @ down_offset[expert]
            if down_bias is not None:
                y = y + down_bias[expert]
            out[token] += router_weights[token, choice] * y
    return out


def _sum_groups(x: Array, offset: Array) -> Array:
    """[groups]: the sum of each group that `offset`, [groups, out], has numbers for."""
    sums: Array = x.reshape(len(offset), -1).sum(1)
    return sums


def _activate(hidden: Array, activation: str, alpha: float, limit: float) -> Array:
    activated: Array
    if activation == "swiglu_oai":
        gate = np.minimum(hidden[::2], limit)
        up = np.clip(hidden[1::2], -limit, limit)
        activated = (up + 1) * gate * _sigmoid(alpha * gate)
        return activated
    gate, up = np.split(hidden, 2)
    if activation == "silu":
        activated = gate * _sigmoid(gate) * up
    elif activation == "gelu":
        activated = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) * up
    elif activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        activated = gate * 0.5 * (1 + np.tanh(inner)) * up
    else:
        raise PluginError(f"MoeExperts has no activation {activation!r}")
    return activated


def _sigmoid(x: Array) -> Array:
    y: Array = 1 / (1 + np.exp(-x))
    return y

"""How a mixture-of-experts module combines gate and up, found by trying it on numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu, silu

from trtforge.errors import ExportError


def is_experts(module: Any) -> bool:
    """Whether the module is the experts of a layer, stacked, whose call the trace replaces."""
    return hasattr(module, "_apply_gate")


def recognize_activation(module: Any) -> dict[str, str | float]:
    """The attributes of MoeExperts that say what the module's gate computes.

    Raises ExportError, naming the module, if it is none of the known ones.
    """
    name = type(module).__name__
    if not module.has_gate:
        raise ExportError(f"{name}: experts without a gate are not supported")
    generator = torch.Generator().manual_seed(0)
    gate_up = 8 * torch.randn(64, 32, generator=generator)  # wide enough to be clamped
    gate, up = gate_up.chunk(2, dim=-1)
    known: list[tuple[dict[str, str | float], torch.Tensor]] = [
        ({"activation": "silu"}, silu(gate) * up),
        ({"activation": "gelu"}, gelu(gate) * up),
        ({"activation": "gelu_tanh"}, gelu(gate, approximate="tanh") * up),
    ]
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if alpha is not None and limit is not None:
        attributes: dict[str, str | float] = {
            "activation": "swiglu_oai",
            "alpha": float(alpha),
            "limit": float(limit),
        }
        known.append((attributes, _swiglu_oai(gate_up, float(alpha), float(limit))))
    with torch.no_grad():
        result = module._apply_gate(gate_up)
    for candidate, expected in known:
        if result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-5, atol=1e-5):
            return candidate
    raise ExportError(f"{name}: the way its experts combine gate and up is not one of the supported ones")


def _swiglu_oai(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate = gate_up[..., ::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)

"""Rope out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute (q_out, k_out): each token is a batch of its own, of one position."""
    cos, sin = (
        op("Unsqueeze", op("CastLike", inputs[name], inputs["q"]), [1])  # [T, 1, R / 2]
        for name in ("cos", "sin")
    )

    def rotate(x: ir.Value | None) -> ir.Value:
        rotated = op(
            "RotaryEmbedding",
            op("Unsqueeze", x, [2]),  # [T, H, 1, D]
            cos,
            sin,
            interleaved=int(attributes["interleaved"]),
            rotary_embedding_dim=int(attributes["rotary_dim"]),
        )
        return op("Squeeze", rotated, [2])

    return rotate(inputs["q"]), rotate(inputs["k"])

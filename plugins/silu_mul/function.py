"""SiluMul out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute y."""
    gate = op("Gather", inputs["gate_up"], 0, axis=1)
    up = op("Gather", inputs["gate_up"], 1, axis=1)
    if attributes["activation"] == "silu":
        gate = op("Mul", gate, op("Sigmoid", gate))
    else:
        gate = op("Gelu", gate, approximate="tanh")
    return (op("Mul", gate, up),)

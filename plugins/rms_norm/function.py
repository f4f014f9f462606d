"""AddRmsNorm out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute (y, h)."""
    h = op("Add", inputs["x"], inputs["residual"])
    return op("RMSNormalization", h, inputs["weight"], epsilon=float(attributes["eps"])), h

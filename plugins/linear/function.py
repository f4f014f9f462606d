"""Linear out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute x @ weight^T + bias."""
    y = op("MatMul", inputs["x"], op("Transpose", inputs["weight"], perm=[1, 0]))
    return (y if inputs["bias"] is None else op("Add", y, inputs["bias"]),)

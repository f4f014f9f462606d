"""AllReduce of one rank out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """A node that gives x on."""
    return (op("Identity", inputs["x"]),)

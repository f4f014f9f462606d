"""QkNorm out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs

_FLOAT32 = ir.DataType.FLOAT.value


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute (q_out, k_out), in float32: RMSNormalization rounds before it multiplies."""

    def normalize(x: ir.Value | None, weight: ir.Value | None) -> ir.Value:
        scale = op("Cast", weight, to=_FLOAT32)
        if attributes["unit_offset"]:
            scale = op("Add", scale, 1.0)
        wide = op("Cast", x, to=_FLOAT32)
        return op("CastLike", op("RMSNormalization", wide, scale, epsilon=float(attributes["eps"])), x)

    return normalize(inputs["q"], inputs["q_weight"]), normalize(inputs["k"], inputs["k_weight"])

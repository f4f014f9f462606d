"""Fp8Gemm out of standard ONNX operators."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.plugins.body import Attributes, Body, Inputs
from trtforge.plugins.fp8_gemm.op import E4M3_MAX, SCALE_BLOCK

_FLOAT32 = ir.DataType.FLOAT.value
_E4M3 = ir.DataType.FLOAT8E4M3FN.value


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that dequantize the weight, round x if asked to, and multiply them in x's dtype."""
    x = inputs["x"]
    if attributes["activation"] != "none":
        x = op("CastLike", _round_activation(op, inputs, attributes), inputs["x"])
    weight = op("CastLike", _dequantize(op, inputs, str(attributes["scales"])), x)
    y = op("MatMul", x, op("Transpose", weight, perm=[1, 0]))
    return (y if inputs["bias"] is None else op("Add", y, inputs["bias"]),)


def _dequantize(op: Body, inputs: Inputs, scales: str) -> ir.Value:
    """The weight as float32."""
    weight, scale = inputs["weight"], inputs["scale"]
    if scales == "tensor":
        return op("DequantizeLinear", weight, op("Squeeze", scale))
    if scales == "channel":
        return op("DequantizeLinear", weight, op("Squeeze", scale, [1]), axis=0)
    # The operator knows blocks along one axis only: a row of scales for each row of the weight.
    out_features = op("Squeeze", op("Shape", weight, start=0, end=1), [0])
    rows = op("Gather", scale, op("Div", op("Range", 0, out_features, 1), SCALE_BLOCK), axis=0)
    return op("DequantizeLinear", weight, rows, axis=1, block_size=SCALE_BLOCK)


def _round_activation(op: Body, inputs: Inputs, attributes: Attributes) -> ir.Value:
    """x rounded to e4m3 times a scale, as float32."""
    x = op("Cast", inputs["x"], to=_FLOAT32)
    if attributes["activation"] == "static":
        scale = op("Squeeze", inputs["x_scale"], [0])
        return op("DequantizeLinear", op("QuantizeLinear", x, scale, output_dtype=_E4M3), scale)
    if attributes["scales"] != "block":
        return _round_rows(op, x)
    # [T, blocks, 128], with zeros where the last block has no inputs.
    in_features = op("Shape", x, start=1, end=2)
    missing = op("Mod", op("Neg", in_features), [SCALE_BLOCK])
    padded = op("Pad", x, op("Concat", [0, 0, 0], missing, axis=0))
    rounded = _round_rows(op, op("Reshape", padded, [0, -1, SCALE_BLOCK]))
    return op("Slice", op("Reshape", rounded, [0, -1]), [0], in_features, [1])


def _round_rows(op: Body, x: ir.Value) -> ir.Value:
    """Each row of the last dim with the scale that makes its largest magnitude e4m3's."""
    largest = op("ReduceMax", op("Abs", x), [-1], keepdims=1)
    scale = op("Where", op("Equal", largest, 0.0), 1.0, op("Div", largest, E4M3_MAX))
    quantized = op("QuantizeLinear", op("Div", x, scale), 1.0, output_dtype=_E4M3)
    return op("Mul", op("DequantizeLinear", quantized, 1.0), scale)

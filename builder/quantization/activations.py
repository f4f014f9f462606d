"""Nodes that round what a projection reads to the format of its weight: int8, or e4m3."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from trtforge.builder.quantization.weights import QuantizedFormat
from trtforge.plugins.fp8_gemm.op import E4M3_MAX
from trtforge.plugins.op import Array

_TYPES: dict[QuantizedFormat, tuple[ir.DataType, float]] = {
    "fp8": (ir.DataType.FLOAT8E4M3FN, E4M3_MAX),
    "int8": (ir.DataType.INT8, 127.0),
}


def largest_number(wanted: QuantizedFormat) -> float:
    """The largest magnitude that activations of a format have before their scale."""
    return _TYPES[wanted][1]


def round_activations(
    graph: ir.Graph, node: ir.Node, wanted: QuantizedFormat, x_scale: ir.Value | None
) -> None:
    """The Linear `node` reads x rounded to `wanted` times `x_scale`, in whose type that happens; without one,
    times a scale of each token, which makes its largest magnitude the largest of `wanted`."""
    if x_scale is None:
        _round_dynamic(graph, node, wanted)
    else:
        _round_static(node, wanted, x_scale)


def _round_static(node: ir.Node, wanted: QuantizedFormat, x_scale: ir.Value) -> None:
    x = node.inputs[0]
    node.replace_input_with(
        0, _cast(node, _round(node, wanted, _cast(node, x, x_scale.dtype), x_scale), x.dtype)
    )


def _round_dynamic(graph: ir.Graph, node: ir.Node, wanted: QuantizedFormat) -> None:
    """x is divided by the largest magnitude of each token, and the product multiplied by it: QuantizeLinear's
    own scale is then a constant, as TensorRT wants it."""
    x, y = node.inputs[0], node.outputs[0]
    one_a_token = ir.Shape([*x.shape[:-1], 1])
    axes = _constant(graph, np.array([-1], np.int64), "activations_axes")
    zero, one, step = (
        _constant(graph, np.array(number, x.dtype.numpy()), f"activations_{name}")
        for name, number in (("0", 0), ("1", 1), (f"{wanted}_step", 1 / largest_number(wanted)))
    )
    magnitude = _add(node, "Abs", [x], x.dtype, x.shape)
    largest = _add(node, "ReduceMax", [magnitude, axes], x.dtype, one_a_token, keepdims=1)
    is_zero = _add(node, "Equal", [largest, zero], ir.DataType.BOOL, one_a_token)
    divisor = _add(node, "Where", [is_zero, one, largest], x.dtype, one_a_token)
    node.replace_input_with(0, _round(node, wanted, _add(node, "Div", [x, divisor], x.dtype, x.shape), step))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    after = [ir.node("Mul", [y, divisor])]
    if bias is not None:
        node.resize_inputs(2)
        after.append(ir.node("Add", [after[0].outputs[0], bias]))
    for new in after:
        new.outputs[0].name = f"{y.name}_x_{new.op_type}"
        new.outputs[0].type, new.outputs[0].shape = y.type, y.shape
    y.replace_all_uses_with(after[-1].outputs[0], replace_graph_outputs=True)
    after[0].replace_input_with(0, y)
    graph.insert_after(node, after)


def _round(node: ir.Node, wanted: QuantizedFormat, x: ir.Value, scale: ir.Value) -> ir.Value:
    to, _ = _TYPES[wanted]
    rounded = _add(node, "QuantizeLinear", [x, scale], to, x.shape, output_dtype=to.value)
    return _add(node, "DequantizeLinear", [rounded, scale], x.dtype, x.shape)


def _cast(node: ir.Node, x: ir.Value, to: ir.DataType) -> ir.Value:
    return x if x.dtype == to else _add(node, "Cast", [x], to, x.shape, to=to.value)


def _add(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value],
    dtype: ir.DataType,
    shape: ir.Shape,
    **attributes: int,
) -> ir.Value:
    """Put a node in front of the Linear `node`; its output."""
    new = ir.node(op_type, inputs, attributes)
    (result,) = new.outputs
    result.name = f"{node.outputs[0].name}_x_{op_type}" + (f"_{dtype.name}" if op_type == "Cast" else "")
    result.type, result.shape = ir.TensorType(dtype), shape
    node.graph.insert_before(node, new)
    return result


def _constant(graph: ir.Graph, array: Array, name: str) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]

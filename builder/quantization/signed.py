"""Quantized weights as TensorRT takes them: signed numbers without zero points, scales of the graph's dtype.

A weight of four bits with zero points is (value - 8) * scale - (zero - 8) * scale, and the second part is one
number a group: its product is that of the sums of the inputs of each group.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trtforge.builder.quantization.parts import (
    INPUT_SCALE,
    PERM,
    SCALES,
    VALUES,
    X_SCALE,
    Part,
    pack_nibbles,
)
from trtforge.builder.quantization.weights import Fp8Weight, Int8Weight, QuantizedLinear
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK
from trtforge.plugins.int4_gemm.packing import SYMMETRIC_ZERO, Int4Weight
from trtforge.plugins.linear.op import LINEAR
from trtforge.plugins.op import DOMAIN, Array

OFFSETS = "_offset"


def declare_signed_parts(linear: QuantizedLinear, dtype: ir.DataType) -> dict[str, Part]:
    """The tensors of a weight in a graph that computes in `dtype`, in the order in which they are stored."""
    out_features, in_features = linear.shape
    if linear.format == "int4":
        per_group = Part(dtype, (out_features, in_features // _group_size(linear)))
        parts = {VALUES: Part(ir.DataType.INT4, linear.shape), SCALES: per_group, OFFSETS: per_group}
        if linear.has_perm:
            parts[PERM] = Part(ir.DataType.INT32, (in_features,))
    elif linear.format == "fp8":
        # DequantizeLinear knows a scale, one a row, or blocks along one axis.
        shapes = {
            "tensor": (),
            "channel": (out_features,),
            "block": (out_features, -(-in_features // SCALE_BLOCK)),
        }
        values = Part(ir.DataType.FLOAT8E4M3FN, linear.shape)
        parts = {VALUES: values, SCALES: Part(dtype, shapes[linear.scales])}
    else:
        parts = {VALUES: Part(ir.DataType.INT8, linear.shape), SCALES: Part(dtype, (out_features,))}
    if linear.read_input_scale is not None:
        parts[INPUT_SCALE] = Part(dtype, (in_features,))
    if linear.read_x_scale is not None:
        parts[X_SCALE] = Part(dtype, ())
    return parts


def make_signed_parts(linear: QuantizedLinear, dtype: ir.DataType) -> dict[str, ir.TensorProtocol]:
    """Read the weight: the data of what `declare_signed_parts` declares."""
    arrays = _arrays(linear)
    if linear.read_input_scale is not None:
        arrays[INPUT_SCALE] = linear.read_input_scale()
    if linear.read_x_scale is not None:
        arrays[X_SCALE] = linear.read_x_scale()
    tensors: dict[str, ir.TensorProtocol] = {}
    for key, part in declare_signed_parts(linear, dtype).items():
        array = np.ascontiguousarray(arrays[key]).reshape(part.shape)
        if part.dtype == ir.DataType.INT4:
            tensors[key] = ir.PackedTensor(pack_nibbles(array), part.dtype, shape=part.shape)
        else:
            tensors[key] = ir.Tensor(array.astype(part.dtype.numpy()), dtype=part.dtype)
    return tensors


def _arrays(linear: QuantizedLinear) -> dict[str, Array]:
    weight = linear.read()
    if isinstance(weight, Int4Weight):
        scales = weight.scales.astype(np.float32)
        # The nibble of a value less 8 is that of the value with its highest bit turned.
        arrays = {
            VALUES: weight.values ^ SYMMETRIC_ZERO,
            SCALES: scales,
            OFFSETS: scales * (weight.zeros.astype(np.float32) - SYMMETRIC_ZERO),
        }
        return arrays if weight.perm is None else arrays | {PERM: weight.perm}
    if isinstance(weight, Fp8Weight) and weight.scales == "block":
        return {VALUES: weight.values, SCALES: weight.row_scale()}
    if isinstance(weight, Fp8Weight | Int8Weight):
        return {VALUES: weight.values, SCALES: weight.scale}
    raise TypeError(f"a weight of type {type(weight).__name__}")


def _group_size(linear: QuantizedLinear) -> int:
    return linear.group_size or linear.shape[1]


def use_signed_weight(
    graph: ir.Graph, node: ir.Node, linear: QuantizedLinear, parts: Mapping[str, ir.Value]
) -> None:
    """The Linear `node` stays; its weight becomes the result of a DequantizeLinear, and what zero points
    take away is subtracted from its output.
    """
    x, out, dtype = node.inputs[0], node.outputs[0], parts[SCALES].dtype
    if PERM in parts:
        x = _insert(graph, node, "Gather", [x, parts[PERM]], {"axis": -1}, shape=x.shape, dtype=x.dtype)
        node.replace_input_with(0, x)
    attributes = {"axis": 0}
    if len(parts[SCALES].shape) == 2:
        size = _group_size(linear) if linear.format == "int4" else SCALE_BLOCK
        attributes = {"axis": 1, "block_size": size}
    inputs = [parts[VALUES], parts[SCALES]]
    weight = _insert(
        graph, node, "DequantizeLinear", inputs, attributes, shape=ir.Shape(linear.shape), dtype=dtype
    )
    node.replace_input_with(1, weight)
    if OFFSETS in parts:
        sums = _sum_groups(graph, node, x, _group_size(linear))
        offset = ir.node(LINEAR.name, [sums, parts[OFFSETS]], domain=DOMAIN)
        difference = ir.node("Sub", [out, offset.outputs[0]])
        for new in (offset, difference):
            new.outputs[0].name = f"{out.name}_{new.op_type}_offset"
            new.outputs[0].type, new.outputs[0].shape = out.type, out.shape
        out.replace_all_uses_with(difference.outputs[0], replace_graph_outputs=True)
        difference.replace_input_with(0, out)
        graph.insert_after(node, [offset, difference])


def _sum_groups(graph: ir.Graph, node: ir.Node, x: ir.Value, group_size: int) -> ir.Value:
    """The sum of each group of x's last dim, [..., groups]."""
    (*batch, in_features) = x.shape
    num_groups = in_features // group_size
    sizes = _numbers(graph, [0] * len(batch) + [num_groups, group_size])
    grouped_shape = ir.Shape([*batch, num_groups, group_size])
    grouped = _insert(graph, node, "Reshape", [x, sizes], {}, shape=grouped_shape, dtype=x.dtype)
    axes = _numbers(graph, [-1])
    sum_shape = ir.Shape([*batch, num_groups])
    return _insert(graph, node, "ReduceSum", [grouped, axes], {"keepdims": 0}, shape=sum_shape, dtype=x.dtype)


def _numbers(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    name = "numbers_" + "_".join(map(str, numbers))
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return graph.initializers[name]


def _insert(
    graph: ir.Graph,
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, int],
    *,
    shape: ir.Shape,
    dtype: ir.DataType,
) -> ir.Value:
    """Put a node in front of the Linear `node`; its output."""
    new = ir.node(op_type, inputs, attributes)
    result = new.outputs[0]
    result.name = f"{node.outputs[0].name}_{op_type}"
    result.type, result.shape = ir.TensorType(dtype), shape
    graph.insert_before(node, new)
    return result

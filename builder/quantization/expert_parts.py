"""The tensors of experts' quantized weights, made one expert at a time, and their place in the graph.

They are the same for all runtimes: DequantizeLinear in front of MoeExperts, of signed numbers without zero
points, in blocks of input features. What zero points take away are offsets of the operator itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trtforge.builder.quantization.experts import QuantizedExperts
from trtforge.builder.quantization.parts import SCALES, VALUES, Part, pack_nibbles
from trtforge.builder.quantization.signed import OFFSETS
from trtforge.plugins.int4_gemm.packing import SYMMETRIC_ZERO
from trtforge.plugins.moe_experts.op import MOE_EXPERTS

_TYPES = {"int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}
_INPUTS = [tensor.name for tensor in MOE_EXPERTS.inputs]


def declare_expert_parts(experts: QuantizedExperts, dtype: ir.DataType) -> dict[str, Part]:
    """The tensors of weights in a graph that computes in `dtype`, in the order in which they are stored."""
    num_experts, *_ = experts.shape
    num_groups = experts.in_features // experts.group_size
    by_group = list(experts.shape)
    by_group[experts.in_axis] = num_groups
    parts = {VALUES: Part(_TYPES[experts.format], experts.shape), SCALES: Part(dtype, tuple(by_group))}
    if experts.format == "int4":
        out_features = experts.shape[3 - experts.in_axis]
        parts[OFFSETS] = Part(dtype, (num_experts, num_groups, out_features))
    return parts


def make_expert_parts(experts: QuantizedExperts, dtype: ir.DataType) -> dict[str, ir.TensorProtocol]:
    """Read the weights: the data of what `declare_expert_parts` declares."""
    parts = declare_expert_parts(experts, dtype)
    is_packed = experts.format == "int4"
    num_experts, rows, columns = experts.shape
    shapes = {key: part.shape for key, part in parts.items()}
    if is_packed:
        shapes[VALUES] = (num_experts, rows * columns // 2)
    arrays = {
        key: np.empty(shape, np.uint8 if is_packed and key == VALUES else parts[key].dtype.numpy())
        for key, shape in shapes.items()
    }
    for number in range(num_experts):
        weight = experts.read(number)
        scale, values = weight.scale, weight.values
        if weight.zero is not None:
            # The nibble of a value less 8 is that of the value with its highest bit turned.
            values = values ^ SYMMETRIC_ZERO
            arrays[OFFSETS][number] = (scale * (weight.zero.astype(np.float32) - SYMMETRIC_ZERO)).T
        if experts.transposed:
            scale, values = scale.T, values.T
        arrays[SCALES][number] = scale
        arrays[VALUES][number] = pack_nibbles(values) if is_packed else values
    tensors: dict[str, ir.TensorProtocol] = {}
    for key, part in parts.items():
        if is_packed and key == VALUES:
            tensors[key] = ir.PackedTensor(arrays[key].reshape(-1), part.dtype, shape=part.shape)
        else:
            tensors[key] = ir.Tensor(arrays[key], dtype=part.dtype)
    return tensors


def use_expert_parts(
    graph: ir.Graph, node: ir.Node, index: int, experts: QuantizedExperts, parts: Mapping[str, ir.Value]
) -> None:
    """The weights `experts` become input `index` of the MoeExperts `node`."""
    attributes = {"axis": experts.in_axis, "block_size": experts.group_size}
    dequantize = ir.node("DequantizeLinear", [parts[VALUES], parts[SCALES]], attributes)
    result = dequantize.outputs[0]
    result.name = f"{parts[VALUES].name}_DequantizeLinear"
    result.type, result.shape = ir.TensorType(parts[SCALES].dtype), ir.Shape(experts.shape)
    graph.insert_before(node, dequantize)
    node.replace_input_with(index, result)
    if OFFSETS in parts:
        place = _INPUTS.index(f"{_INPUTS[index]}_offset")
        node.resize_inputs(max(len(node.inputs), place + 1))
        node.replace_input_with(place, parts[OFFSETS])

"""Gives Linear and MoeExperts nodes quantized weights, or puts operators with such weights in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from trtforge.builder.quantization.activations import round_activations
from trtforge.builder.quantization.choice import choose_weight, describe_weight, matrix_names
from trtforge.builder.quantization.expert_parts import (
    declare_expert_parts,
    make_expert_parts,
    use_expert_parts,
)
from trtforge.builder.quantization.experts import QuantizedExperts
from trtforge.builder.quantization.parts import (
    INPUT_SCALE,
    PERM,
    SCALES,
    VALUES,
    X_SCALE,
    ZEROS,
    LatestParts,
    Part,
    declare_parts,
    make_parts,
)
from trtforge.builder.quantization.policy import Lowering, WeightChoice, WeightPolicy
from trtforge.builder.quantization.signed import (
    declare_signed_parts,
    make_signed_parts,
    use_signed_weight,
)
from trtforge.builder.quantization.weights import QuantizedLinear
from trtforge.builder.weights import WeightSource
from trtforge.errors import ConfigError
from trtforge.plugins.fp8_gemm.op import FP8_GEMM, SCALE_BLOCK
from trtforge.plugins.int4_gemm.op import INT4_GEMM
from trtforge.plugins.op import DOMAIN

_DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.FLOAT16: "float16",
}


def quantize_weights(
    graph: ir.Graph,
    sources: Mapping[str, WeightSource],
    policy: WeightPolicy,
    output_embedding: str,
) -> tuple[WeightChoice, ...]:
    """Change `graph` in place; returns what became of each weight of two dims or more.

    Weights that the checkpoint holds quantized keep their numbers; others are rounded as `policy` says. No
    data is read before the graph's weights are written, and then one weight at a time.

    Raises ConfigError if the quantization can be applied to no weight, or not to the part of one that a rank
    has.
    """
    latest, quantization = LatestParts(), policy.quantization
    choices = []
    for value in [graph.initializers[name] for name in matrix_names(graph, sources)]:
        source = sources[value.name]
        found = choose_weight(value, source, policy, output_embedding)
        choice = WeightChoice(
            name=value.name,
            shape=tuple(value.shape.numpy()),
            kind=_DTYPE_NAMES[value.dtype],
            group_size=None,
            reason=found if isinstance(found, str) else describe_weight(found, policy.lowering),
            bytes_before=value.const_value.nbytes,
            bytes_after=value.const_value.nbytes,
        )
        if isinstance(found, QuantizedExperts):
            nbytes = _replace_experts(graph, value, found, latest)
            group_size = found.group_size if found.format == "int4" else None
            choice = replace(choice, kind=found.format, group_size=group_size, bytes_after=nbytes)
        elif not isinstance(found, str):
            nbytes = _replace_weight(graph, value, found, policy.lowering, latest)
            choice = replace(choice, kind=found.format, group_size=found.group_size, bytes_after=nbytes)
        choices.append(choice)
    if quantization is not None and all(choice.kind != quantization.format for choice in choices):
        reasons = "; ".join(sorted({choice.reason for choice in choices}))
        raise ConfigError(f"--{quantization.format} can be applied to no weight of this model: {reasons}")
    return tuple(choices)


def _replace_weight(
    graph: ir.Graph, value: ir.Value, linear: QuantizedLinear, lowering: Lowering, latest: LatestParts
) -> int:
    """Change all nodes that use the weight `value`; returns the bytes that it has now."""
    name, dtype = value.name, value.dtype
    nodes = [use.node for use in value.uses()]
    del graph.initializers[name]
    if lowering == "signed":
        declared, make = declare_signed_parts(linear, dtype), partial(make_signed_parts, linear, dtype)
    else:
        declared, make = declare_parts(linear, lowering, dtype), partial(make_parts, linear, lowering, dtype)
    parts = _add_parts(graph, name, declared, make, latest)
    for node in nodes:
        if INPUT_SCALE in parts:
            _insert(graph, node, ir.node("Mul", [node.inputs[0], parts[INPUT_SCALE]]))
        if linear.activations is not None and lowering != "plugin":
            round_activations(graph, node, linear.format, parts.get(X_SCALE))
        if linear.has_float_zeros:
            _use_arithmetic(graph, node, linear, parts, dtype)
        elif lowering == "native":
            _use_standard_operators(graph, node, linear, parts, dtype)
        elif lowering == "signed":
            use_signed_weight(graph, node, linear, parts)
        else:
            _use_own_operator(graph, node, linear, parts)
    return _nbytes(parts)


def _replace_experts(graph: ir.Graph, value: ir.Value, experts: QuantizedExperts, latest: LatestParts) -> int:
    """The same of weights that belong to experts."""
    uses = list(value.uses())
    del graph.initializers[value.name]
    declared = declare_expert_parts(experts, value.dtype)
    make = partial(make_expert_parts, experts, value.dtype)
    parts = _add_parts(graph, value.name, declared, make, latest)
    for use in uses:
        use_expert_parts(graph, use.node, use.idx, experts, parts)
    return _nbytes(parts)


def _add_parts(
    graph: ir.Graph,
    name: str,
    declared: Mapping[str, Part],
    make: Callable[[], Mapping[str, ir.TensorProtocol]],
    latest: LatestParts,
) -> dict[str, ir.Value]:
    """The tensors of the weight `name`, which are in the graph now; `make` reads them."""
    parts = {}
    for key, part in declared.items():
        parts[key] = ir.Value(
            name=name + key,
            type=ir.TensorType(part.dtype),
            shape=ir.Shape(part.shape),
            const_value=latest.tensor(name, key, part, make),
        )
        graph.register_initializer(parts[key])
    return parts


def _nbytes(parts: Mapping[str, ir.Value]) -> int:
    return sum(part.const_value.nbytes for part in parts.values())


def _insert(
    graph: ir.Graph, node: ir.Node, before: ir.Node, index: int = 0, dtype: ir.DataType | None = None
) -> None:
    """Put the node `before` in front of `node`, whose input `index` its output becomes.

    The output has that input's shape and, without `dtype`, its type.
    """
    result, replaced = before.outputs[0], node.inputs[index]
    result.name = f"{node.outputs[0].name}_{before.op_type}"
    result.type, result.shape = ir.TensorType(dtype or replaced.dtype), replaced.shape
    graph.insert_before(node, before)
    node.replace_input_with(index, result)


def _use_standard_operators(
    graph: ir.Graph, node: ir.Node, linear: QuantizedLinear, parts: Mapping[str, ir.Value], dtype: ir.DataType
) -> None:
    """Linear stays, and its weight becomes the result of a DequantizeLinear.

    Its type is that of the scales. A conversion follows, and not the attribute `output_dtype`, which ONNX
    Runtime does not know yet.
    """
    if PERM in parts:
        _insert(graph, node, ir.node("Gather", [node.inputs[0], parts[PERM]], {"axis": -1}))
    attributes = {"axis": 1 if len(parts[SCALES].shape) == 2 else 0}
    if linear.format == "fp8" and len(parts[SCALES].shape) == 2:
        attributes["block_size"] = SCALE_BLOCK
    elif linear.format == "int4" or linear.group_size is not None:
        attributes["block_size"] = linear.group_size or linear.shape[1]
    inputs = [parts[key] for key in (VALUES, SCALES, ZEROS) if key in parts]
    dequantize = ir.node("DequantizeLinear", inputs, attributes)
    _insert(graph, node, dequantize, index=1, dtype=ir.DataType.FLOAT)
    if dtype != ir.DataType.FLOAT:
        _insert(graph, node, ir.node("Cast", [node.inputs[1]], {"to": dtype.value}), index=1, dtype=dtype)


def _use_arithmetic(
    graph: ir.Graph, node: ir.Node, linear: QuantizedLinear, parts: Mapping[str, ir.Value], dtype: ir.DataType
) -> None:
    """The same without DequantizeLinear, whose zero points are of the weight's type: whole numbers."""
    values = parts[VALUES]
    shape = ir.tensor(linear.shape, ir.DataType.INT64, name=f"{values.name}_shape")
    if shape.name not in graph.initializers:
        graph.register_initializer(ir.Value(name=shape.name, const_value=shape))
    float32 = ir.DataType.FLOAT
    node.replace_input_with(1, values)
    for operator, others, attributes in (
        ("Cast", [], {"to": float32.value}),
        ("Sub", [parts[ZEROS]], {}),
        ("Mul", [parts[SCALES]], {}),
        ("Reshape", [graph.initializers[shape.name]], {}),
    ):
        _insert(graph, node, ir.node(operator, [node.inputs[1], *others], attributes), index=1, dtype=float32)
    node.inputs[1].shape = ir.Shape(linear.shape)
    if dtype != float32:
        _insert(graph, node, ir.node("Cast", [node.inputs[1]], {"to": dtype.value}), index=1, dtype=dtype)
        node.inputs[1].name += f"_{dtype.name}"  # the first node is a Cast too


def _use_own_operator(
    graph: ir.Graph, node: ir.Node, linear: QuantizedLinear, parts: Mapping[str, ir.Value]
) -> None:
    """An operator that multiplies by the quantized weight takes the place of Linear."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    inputs = [node.inputs[0], parts[VALUES], parts[SCALES], bias]
    if linear.format == "int4":
        spec, attributes = INT4_GEMM, INT4_GEMM.node_attributes()
        inputs.append(parts.get(PERM))
    else:
        activation = linear.activations or "none"
        spec, attributes = FP8_GEMM, FP8_GEMM.node_attributes(scales=linear.scales, activation=activation)
        inputs.append(parts.get(X_SCALE))
    while inputs[-1] is None:
        inputs.pop()
    replacement = ir.node(spec.name, inputs, attributes, domain=DOMAIN)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [replacement], node.outputs, replacement.outputs
    )

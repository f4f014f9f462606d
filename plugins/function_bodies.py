"""Adds to a model what its custom operators mean in standard ones.

ONNX Runtime and TensorRT-RTX need that and get it when they load a model. It is never stored: full TensorRT
has to find its plugins, and which of the two its parser takes depends on its version.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias, TypeVar

import onnx
from onnxscript import ir

from trtforge.errors import PluginError
from trtforge.plugins.body import STANDARD_OPSET, Body
from trtforge.plugins.op import DOMAIN, AttributeValue
from trtforge.plugins.operators import OPERATORS

Model = TypeVar("Model", onnx.ModelProto, ir.Model)

# Operator, attributes, and of its inputs which are there and their dtypes, as far as the graph has them.
_Variant: TypeAlias = tuple[
    str, tuple[tuple[str, AttributeValue], ...], tuple[tuple[bool, ir.DataType | None], ...]
]


def add_function_bodies(model: Model, keep: Collection[str] = ()) -> Model:
    """Turn the custom nodes of `model` into calls of functions that it then carries; returns `model`. Those
    of the operators named in `keep` stay what they are.

    Attributes are compiled into the functions: nodes of one operator that differ in them, in which inputs
    they have or in their dtypes call different functions (PagedAttention, PagedAttention_2, …), because
    TensorRT's parser tells functions apart by their names only. Raises PluginError for an unknown operator.
    """
    if isinstance(model, onnx.ModelProto):
        model.CopyFrom(ir.to_proto(add_function_bodies(ir.from_proto(model), keep)))
        return model
    variants: dict[_Variant, str] = {}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type in keep:
            continue
        if node.op_type not in OPERATORS:
            raise PluginError(f"the model has an operator {DOMAIN}::{node.op_type}, which is not known here")
        key = _variant(node)
        if key not in variants:
            number = 1 + sum(variant[0] == node.op_type for variant in variants)
            variants[key] = node.op_type if number == 1 else f"{node.op_type}_{number}"
            function = _function(node, variants[key])
            model.functions[function.identifier()] = function
        node.op_type = variants[key]
        _close_gaps(node)
    model.opset_imports.setdefault(DOMAIN, 1)
    return model


def _variant(node: ir.Node) -> _Variant:
    """What two nodes must have in common to call the same function."""
    attributes = tuple(sorted((name, attribute.value) for name, attribute in node.attributes.items()))
    inputs = ((value is not None, None if value is None else value.dtype) for value in node.inputs)
    return node.op_type, attributes, tuple(inputs)


def _close_gaps(node: ir.Node) -> None:
    """Move inputs up where one before them is left out: TensorRT-RTX takes no call of a function without."""
    given = [value for value in node.inputs if value is not None]
    for index, value in enumerate(given):
        node.replace_input_with(index, value)
    node.resize_inputs(len(given))


def _function(node: ir.Node, name: str) -> ir.Function:
    operator = OPERATORS[node.op_type]
    spec = operator.spec
    given = [*node.inputs, *[None] * (len(spec.inputs) - len(node.inputs))]
    inputs = {
        tensor.name: None if value is None else ir.Value(name=tensor.name, type=value.type)
        for tensor, value in zip(spec.inputs, given, strict=True)
    }
    names = {attribute.name for attribute in spec.attributes}
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name in names}
    body = Body()
    outputs = operator.write_body(body, inputs, spec.node_attributes(**attributes))
    graph = ir.Graph(
        [value for value in inputs.values() if value is not None],  # as _close_gaps leaves the node
        outputs,
        nodes=body.nodes,
        opset_imports={"": STANDARD_OPSET},
        name=name,
    )
    # The nodes keep their attributes, so that the model still fits the operators' schemas.
    unused = [ir.Attr(key, attribute.type, None) for key, attribute in node.attributes.items()]
    return ir.Function(DOMAIN, name, graph=graph, attributes=unused)

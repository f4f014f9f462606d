"""Which calls of operators a graph makes, and the kernels that they may need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnxscript import ir

from trtforge.errors import PluginError
from trtforge.plugins.launch import Call, Kernel
from trtforge.plugins.op import DOMAIN, OpSpec
from trtforge.plugins.operators import OPERATORS


def calls_of(model: ir.Model, sizes: Mapping[str, int]) -> list[tuple[str, Call]]:
    """The different calls of custom operators in `model`, each with the operator's name.

    `sizes` gives symbolic dims that are fixed when the graph runs; all others are -1.
    Raises PluginError for an unknown operator, and for an input whose shape or dtype the graph does not tell.
    """
    calls: list[tuple[str, Call]] = []
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        if node.op_type not in OPERATORS:
            raise PluginError(f"the model has an operator {DOMAIN}::{node.op_type}, which is not known here")
        call = node.op_type, _call(OPERATORS[node.op_type].spec, node, sizes)
        if call not in calls:
            calls.append(call)
    return calls


def kernels_for(calls: Iterable[tuple[str, Call]], arch: int) -> tuple[Kernel, ...]:
    """The kernels that these calls may need, each once. Operators that have no kernels need none.

    Raises PluginError for what the kernels of an operator cannot do.
    """
    kernels: dict[Kernel, None] = {}
    for name, call in calls:
        operator = OPERATORS[name]
        if operator.kernels is not None:
            kernels |= dict.fromkeys(operator.kernels.choices(call, arch))
    return tuple(kernels)


def _call(spec: OpSpec, node: ir.Node, sizes: Mapping[str, int]) -> Call:
    shapes, dtypes = {}, {}
    for tensor, value in zip(spec.inputs, node.inputs, strict=False):  # optional ones may be left out
        if value is None:
            continue
        if value.shape is None or value.dtype is None:
            raise PluginError(f"{node.name}: the graph does not tell shape and dtype of {tensor.name}")
        shapes[tensor.name] = tensor.declared_shape([_size(dim, sizes) for dim in value.shape])
        dtypes[tensor.name] = value.dtype.numpy().name
    names = {attribute.name for attribute in spec.attributes}
    given = {name: attribute.value for name, attribute in node.attributes.items() if name in names}
    complete = spec.node_attributes(**given)
    return Call(shapes, dtypes, {name: complete[name] for name in sorted(names)})


def _size(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes.get(str(dim.value), -1)

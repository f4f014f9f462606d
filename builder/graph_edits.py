"""Small steps of passes over a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir


def append_before(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | Sequence[int] | None],
    attributes: Mapping[str, ir.Attr | int | float | Sequence[int]] | None = None,
    domain: str = "",
) -> ir.Value:
    """Put a node of one output before `node`; the output, of which nothing is known yet.

    Lists of numbers become constants of int64.
    """
    graph = node.graph
    if graph is None:
        raise ValueError(f"node {node.name} is in no graph")
    values: list[ir.Value | None] = []
    for given in inputs:
        if given is None or isinstance(given, ir.Value):
            values.append(given)
            continue
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(given, np.int64))})
        (value,) = constant.outputs
        value.const_value = constant.attributes["value"].as_tensor()
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape([len(given)])
        graph.insert_before(node, constant)
        values.append(value)
    new = ir.node(op_type, values, dict(attributes or {}), domain=domain)
    graph.insert_before(node, new)
    return new.outputs[0]


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant of rank 1; None for other values."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or len(tensor.shape) != 1:
        return None
    return [int(number) for number in tensor.numpy()]


def constant_number(value: ir.Value | None) -> float | None:
    """The number of a constant of one element; None for other values."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def rank_of(value: ir.Value | None) -> int | None:
    """How many dims a value has; None if that is not known."""
    return None if value is None or value.shape is None else len(value.shape)

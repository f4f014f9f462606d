"""The lookup of token embeddings by ranks that have some of the vocabulary each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtforge import wire
from trtforge.builder.sharding.cut import Cut
from trtforge.builder.sharding.rank_graph import RankGraph
from trtforge.builder.sharding.split import split_evenly

_SHAPE_OPERATORS = ("Cast", "Reshape", "Squeeze", "Unsqueeze")


def is_token_embedding(node: ir.Node) -> bool:
    """Whether the node looks token ids up in a table of weights."""
    if node.domain or node.op_type != "Gather":
        return False
    table, ids = node.inputs
    axis = int(node.attributes["axis"].value) if "axis" in node.attributes else 0
    if axis != 0 or not table.is_initializer() or len(table.shape) != 2:
        return False
    while ids.producer() is not None and ids.producer().op_type in _SHAPE_OPERATORS:
        ids = ids.producer().inputs[0]
    return bool(ids.name == wire.GRAPH_INPUTS[0].name)


def divide_embedding(graph: RankGraph, node: ir.Node, tp: int) -> None:
    """Put in place of the lookup `node` one of the rank's own tokens, zeros for others, and a sum."""
    table, ids = node.inputs
    cut = Cut.of(0, split_evenly(table.shape[0], tp))
    ((start, stop),) = cut.ranges[graph.rank]

    def number(value: int) -> ir.Value:
        return graph.numbers(np.array(value), ids.dtype)

    rows = graph.add(node, "Sub", [ids, number(start)], ids)
    truth = ir.Value(type=ir.TensorType(ir.DataType.BOOL), shape=ids.shape)
    is_own = graph.add(
        node,
        "And",
        [
            graph.add(node, "GreaterOrEqual", [rows, number(0)], truth),
            graph.add(node, "Less", [rows, number(stop - start)], truth),
        ],
        truth,
    )
    rows = graph.add(node, "Where", [is_own, rows, number(0)], ids)
    found = graph.add(node, "Gather", [graph.part_of(node, table, cut), rows], node.outputs[0], {"axis": 0})
    mask = ir.Value(type=truth.type, shape=ir.Shape([*ids.shape, 1]))
    mask = graph.add(node, "Unsqueeze", [is_own, graph.integers([-1])], mask)
    zero = graph.numbers(np.array(0.0), table.dtype)
    own = graph.add(node, "Where", [mask, found, zero], node.outputs[0])
    graph.replace(node, graph.all_reduce(node, own))

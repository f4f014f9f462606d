"""Finds the nodes of one decoder layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from trtforge import wire
from trtforge.errors import ConfigError
from trtforge.plugins.op import DOMAIN
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

# Their outputs say how large a tensor is, not what is in it.
_SHAPE_OPERATORS = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class Layer:
    """The nodes of one decoder layer, in the graph's order."""

    index: int
    nodes: tuple[ir.Node, ...]
    weight_prefix: str  # of the names of its weights, such as "model.layers.3."; "" if they have none


def find_layer(model: ir.Model, index: int) -> Layer:
    """The nodes between the hidden states before and after the layer that stores into cache `index`.

    Names of weights and operators differ between models, but hidden states flow alike in all: what the
    tokens become on their way to the logits goes, between two layers, through a single node. So the way is
    cut behind each node that everything goes through. A layer begins with the piece that holds its attention
    and goes on to the next attention's piece; the last layer to the last piece that uses a weight of its own.
    Nodes from which this layer alone takes something, such as the making of a shape, belong to it.

    Raises ConfigError if the graph has no such layer.
    """
    hidden_state_nodes = _hidden_state_nodes(model.graph)
    pieces = _cut(hidden_state_nodes)
    begins = [begin for begin, piece in enumerate(pieces) if any(map(_is_attention, piece))]
    if not 0 <= index < len(begins):
        layers = f"layers 0 to {len(begins) - 1}" if begins else "no node PagedAttention, so no layers"
        raise ConfigError(f"--layer {index} is not in the graph, which has {layers}")
    begin = begins[index]
    prefix = _weight_prefix(pieces[begin], index)
    if index + 1 < len(begins):
        end = begins[index + 1]
    else:
        end = 1 + max(
            number
            for number, piece in enumerate(pieces)
            if number == begin or (prefix and any(name.startswith(prefix) for name in _weight_names(piece)))
        )
    chosen = {node for piece in pieces[begin:end] for node in piece}
    others = set(hidden_state_nodes) - chosen
    return Layer(index, tuple(_with_helpers(model.graph, chosen, others)), prefix)


def _is_attention(node: ir.Node) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == PAGED_ATTENTION.name)


def _hidden_state_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Nodes on the ways from tokens to logits, or hidden states of a pipeline stage in their place, in the
    graph's order, which is topological."""
    forward = {value for value in graph.inputs if value.name in ("input_ids", wire.HIDDEN_STATES)}
    nodes = []
    for node in graph:
        if node.op_type not in _SHAPE_OPERATORS and not forward.isdisjoint(node.inputs):
            forward.update(node.outputs)
            nodes.append(node)
    backward = {value for value in graph.outputs if value.name in (wire.LOGITS, wire.HIDDEN_STATES_OUT)}
    result = []
    for node in reversed(nodes):
        if not backward.isdisjoint(node.outputs):
            backward.update(value for value in node.inputs if value is not None)
            result.append(node)
    return result[::-1]


def _cut(nodes: list[ir.Node]) -> list[list[ir.Node]]:
    """The nodes in pieces: all that is still to be used between two of them comes from one node.

    In any topological order all that leads to such a node comes before it, and all that follows from it after
    it, because every node is on a way through it. Its outputs are mostly one: a sum, or that and its norm.
    """
    last_use = {value: number for number, node in enumerate(nodes) for value in node.inputs}
    pieces: list[list[ir.Node]] = [[]]
    alive: set[ir.Value] = set()
    for number, node in enumerate(nodes):
        pieces[-1].append(node)
        alive = {value for value in alive if last_use[value] > number}
        alive.update(value for value in node.outputs if last_use.get(value, -1) > number)
        if len({value.producer() for value in alive}) == 1:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _weight_prefix(piece: Iterable[ir.Node], index: int) -> str:
    for name in _weight_names(piece):
        parts = name.split(".")
        if str(index) in parts:
            return ".".join([*parts[: parts.index(str(index)) + 1], ""])
    return ""


def _weight_names(piece: Iterable[ir.Node]) -> Iterable[str]:
    return (
        value.name or ""
        for node in piece
        for value in node.inputs
        if value is not None and value.is_initializer()
    )


def _with_helpers(graph: ir.Graph, chosen: set[ir.Node], others: set[ir.Node]) -> list[ir.Node]:
    """The chosen nodes, and those whose outputs go to chosen nodes only, unless they are among `others`."""
    result = []
    for node in reversed(list(graph)):
        users = [user for value in node.outputs for user in value.consumers()]
        is_output = any(value.is_graph_output() for value in node.outputs)
        helps = users and not is_output and node not in others and chosen.issuperset(users)
        if node in chosen or helps:
            chosen.add(node)
            result.append(node)
    return result[::-1]

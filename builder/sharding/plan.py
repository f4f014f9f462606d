"""Decides which values of a graph ranks have parts of, and which projections they therefore share.

The graph is walked from its end to its beginning. A projection that multiplies what is made of other
projections, or of attention, by nothing but operators that work element by element, needs of its input only
the columns that its own part of the weight has; so does each operator before it, down to the projections
that make these columns. Rows of their weights are then all that a rank keeps. Sums over ranks follow the
projections where that began.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from trtforge import wire
from trtforge.builder.sharding.cut import Cut, combine
from trtforge.builder.sharding.experts import down_axis
from trtforge.builder.sharding.rules import (
    ELEMENTWISE,
    Cuts,
    elementwise_cut,
    is_projection,
    reduced_axis,
    rule_of,
    sizes_of,
)
from trtforge.builder.sharding.split import Range, split_evenly, split_features, split_heads
from trtforge.errors import ConfigError, ExportError
from trtforge.plugins.moe_experts.op import MOE_EXPERTS
from trtforge.plugins.op import DOMAIN
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

# Sizes of which a rank's part of a weight's input features is a multiple, the best one first.
Multiples: TypeAlias = Callable[[ir.Value], Sequence[int]]

_KV_CACHE_HEADS = 3  # the axis
_SINKS, _ALIBI_SLOPES = 8, 9  # inputs of PagedAttention that have an element for each query head


@dataclass(frozen=True, slots=True)
class _Flexible:
    """A consumer takes all of an axis together: it can do so for a part, and add up what ranks have."""

    axis: int


_Wish: TypeAlias = Cut | _Flexible | None  # None: the whole value


@dataclass(slots=True)
class ShardPlan:
    """What ranks have of each value that is not whole, and of nodes that become something else."""

    tp: int
    cuts: dict[ir.Value, Cut] = field(default_factory=dict)
    inputs: dict[ir.Node, Cuts] = field(default_factory=dict)  # of nodes whose outputs are cut
    rows: dict[ir.Node, Cut] = field(default_factory=dict)  # projections followed by a sum: of their input
    experts: dict[ir.Node, tuple[Range, ...]] = field(default_factory=dict)  # of MoeExperts, by rank
    reductions: dict[ir.Node, Cut] = field(default_factory=dict)  # followed by a sum: of their input
    logits: tuple[Range, ...] = ()  # columns, by rank


def make_shard_plan(graph: ir.Graph, tp: int, multiples: Multiples) -> ShardPlan:
    """Divide `graph`, of one pipeline stage, among `tp` ranks.

    Raises ConfigError if there are fewer heads than ranks, and ExportError, naming the node, for attention
    that cannot be divided by heads.
    """
    return _Planner(graph, tp, multiples).plan()


class _Planner:
    def __init__(self, graph: ir.Graph, tp: int, multiples: Multiples) -> None:
        self._graph = graph
        self._plan = ShardPlan(tp)
        self._multiples = multiples
        self._wishes: dict[ir.Value, list[_Wish]] = defaultdict(list)

    def plan(self) -> ShardPlan:
        for output in self._graph.outputs:
            self._wishes[output].append(self._output_wish(output))
        for node in reversed(self._graph):
            outputs = [self._decide(value) for value in node.outputs]
            inputs = self._divide(node, outputs)
            for value, wish in zip(node.inputs, inputs, strict=False):
                if value is not None:
                    self._wishes[value].append(wish)
        return self._plan

    def _output_wish(self, output: ir.Value) -> _Wish:
        sizes = sizes_of(output)
        if output.name != wire.LOGITS or sizes is None or not isinstance(sizes[1], int):
            return None
        if self._plan.tp > sizes[1]:
            raise ConfigError(f"--tp {self._plan.tp} is more than the {sizes[1]} tokens of the vocabulary")
        self._plan.logits = split_evenly(sizes[1], self._plan.tp)
        return Cut.of(1, self._plan.logits)

    def _decide(self, value: ir.Value) -> Cut | None:
        """What the value's consumers agree upon."""
        wishes = self._wishes.get(value, [])
        cuts = [wish for wish in wishes if isinstance(wish, Cut)]
        if not cuts or None in wishes:
            return None
        cut = combine(cuts)
        others = [wish for wish in wishes if isinstance(wish, _Flexible)]
        return None if cut is None or any(wish.axis != cut.axis for wish in others) else cut

    def _divide(self, node: ir.Node, outputs: Cuts) -> Sequence[_Wish]:
        """Wishes for the node's inputs."""
        if (node.domain, node.op_type) == (DOMAIN, PAGED_ATTENTION.name):
            return self._divide_attention(node, outputs[0])
        rule = rule_of(node)
        inputs = rule(node, outputs) if rule is not None and any(outputs) else None
        if inputs is not None:
            self._plan.inputs[node] = inputs
            for value, cut in zip(node.outputs, outputs, strict=True):
                if cut is not None:
                    self._cut(value, cut)
            return [*inputs, *[None] * (len(node.inputs) - len(inputs))]
        whole: list[_Wish] = [None] * len(node.inputs)
        if (node.domain, node.op_type) == (DOMAIN, MOE_EXPERTS.name):
            self._divide_experts(node)
        elif is_projection(node):
            cut = self._row_cut(node)
            if cut is not None:
                self._plan.rows[node] = cut
                whole[0] = cut
        else:
            self._be_flexible(node, whole)
        return whole

    # ------------------------------------------------------------------ attention and experts

    def _divide_attention(self, node: ir.Node, wanted: Cut | None) -> Sequence[_Wish]:
        q, k = sizes_of(node.inputs[0]), sizes_of(node.inputs[1])
        if q is None or k is None or not isinstance(q[1], int) or not isinstance(k[1], int):
            raise ExportError(f"the attention node {node.name} has an unknown number of heads")
        heads, kv_heads = self._head_cuts(q[1], k[1])
        if wanted != heads:
            raise ExportError(
                f"the attention node {node.name} cannot be divided among ranks: no projection follows that "
                "takes its heads one after the other; build the model with --tp 1"
            )
        inputs: list[Cut | None] = [heads, kv_heads, kv_heads, *[None] * (len(node.inputs) - 3)]
        inputs[3] = kv_heads.at(_KV_CACHE_HEADS)
        for index in (_SINKS, _ALIBI_SLOPES):
            if len(node.inputs) > index and node.inputs[index] is not None:
                inputs[index] = heads.at(0)
        self._plan.inputs[node] = inputs
        self._plan.cuts[node.inputs[3]] = kv_heads.at(_KV_CACHE_HEADS)
        self._plan.cuts[node.outputs[0]] = heads
        self._plan.cuts[node.outputs[1]] = kv_heads.at(_KV_CACHE_HEADS)
        return inputs

    def _head_cuts(self, num_heads: int, num_kv_heads: int) -> tuple[Cut, Cut]:
        shares = split_heads(num_heads, num_kv_heads, self._plan.tp)
        return Cut.of(1, [share.heads for share in shares]), Cut.of(1, [share.kv_heads for share in shares])

    def _divide_experts(self, node: ir.Node) -> None:
        down = node.inputs[4]
        ranges = self._features(down, down.shape[down_axis(node)])
        if ranges is not None:
            self._plan.experts[node] = ranges

    # ------------------------------------------------------------------ projections before a sum

    def _row_cut(self, node: ir.Node) -> Cut | None:
        """How the input of a projection is divided, whose products ranks add up; None if it stays whole."""
        found = _sources(node.inputs[0])
        if found is None:
            return None
        sources, visited = found
        axis = len(node.inputs[0].shape) - 1
        size = int(node.inputs[0].shape[axis])
        attention = next((source for source in sources if not is_projection(source)), None)
        if attention is not None:
            num_heads, num_kv_heads = attention.inputs[0].shape[1], attention.inputs[1].shape[1]
            return self._head_cuts(num_heads, num_kv_heads)[0].scaled(axis, size, num_heads)
        for source in sources:
            into = _sources(source.inputs[0])
            if into is not None and not all(map(is_projection, into[0])):
                return None  # follows attention itself
        for value in (value for before in visited for value in before.outputs):
            if not all(user in visited or is_projection(user) for user in value.consumers()):
                return None  # all of it is needed, as by a norm
        ranges = self._features(node.inputs[1], size)
        return None if ranges is None else Cut.of(axis, ranges)

    def _features(self, weight: ir.Value, size: int) -> tuple[Range, ...] | None:
        """The input features of a weight that each rank has; None if there are fewer than ranks."""
        multiples = self._multiples(weight)
        ranges = split_features(size, self._plan.tp, multiples)
        if ranges is None and size >= self._plan.tp:
            raise ConfigError(
                f"--tp {self._plan.tp} cannot divide {weight.name}, which is quantized: its {size} input "
                f"features can only be parted at multiples of {multiples[-1]}; use a smaller --tp"
            )
        return ranges

    # ------------------------------------------------------------------ norms over an axis that is cut

    def _be_flexible(self, node: ir.Node, wishes: list[_Wish]) -> None:
        """Let inputs be cut where all that comes of them is taken together along that axis."""
        axis = reduced_axis(node)
        if axis is not None and node.op_type in ("ReduceMean", "ReduceSum"):
            wishes[0] = _Flexible(axis)
        elif not node.domain and node.op_type in ELEMENTWISE:
            wanted = self._wishes.get(node.outputs[0], [])
            sizes = sizes_of(node.outputs[0])
            first = wanted[0] if wanted else None
            if sizes is None or not isinstance(first, _Flexible) or any(wish != first for wish in wanted):
                return
            full = [
                index
                for index, value in enumerate(node.inputs)
                if value is not None and _is_full(value, sizes)
            ]
            if len({node.inputs[index] for index in full}) == 1:
                for index in full:
                    wishes[index] = first

    def _cut(self, value: ir.Value, cut: Cut) -> None:
        """The value is cut, and so is what its flexible consumers make of it."""
        self._plan.cuts[value] = cut
        for node in value.consumers():
            if node in self._plan.inputs or node in self._plan.rows:
                continue
            if reduced_axis(node) == cut.axis:
                self._plan.reductions[node] = cut
            elif not node.domain and node.op_type in ELEMENTWISE:
                sizes = sizes_of(node.outputs[0]) or []
                self._plan.inputs[node] = [elementwise_cut(other, len(sizes), cut) for other in node.inputs]
                self._cut(node.outputs[0], cut)


def _is_full(value: ir.Value, sizes: list[int | str | None]) -> bool:
    return sizes_of(value) == sizes


def _sources(value: ir.Value) -> tuple[set[ir.Node], set[ir.Node]] | None:
    """The projections and attention that `value` is made of, and all nodes on the way, themselves included.

    None if its last axis depends on anything else.
    """
    sizes = sizes_of(value)
    if sizes is None or not isinstance(sizes[-1], int):
        return None
    open_values = [(value, len(sizes) - 1)]
    sources: set[ir.Node] = set()
    visited: set[ir.Node] = set()
    seen: set[tuple[ir.Value, int]] = set()
    while open_values:
        value, axis = open_values.pop()
        if (value, axis) in seen:
            continue
        seen.add((value, axis))
        node = value.producer()
        if node is None:
            if value.is_initializer():
                continue
            return None
        visited.add(node)
        if (node.domain, node.op_type) == (DOMAIN, PAGED_ATTENTION.name):
            sources.add(node)
            continue
        rule = rule_of(node)
        inputs = rule(node, [_everything(output, axis) for output in node.outputs]) if rule else None
        if inputs is None:
            return None
        if is_projection(node):
            sources.add(node)
        else:
            open_values += [
                (before, cut.axis)
                for before, cut in zip(node.inputs, inputs, strict=False)
                if before is not None and cut is not None
            ]
    return sources, visited


def _everything(value: ir.Value, axis: int) -> Cut | None:
    """What one rank has that is alone."""
    sizes = sizes_of(value)
    size = sizes[axis] if sizes is not None and axis < len(sizes) else None
    return Cut.of(axis, [(0, size)]) if isinstance(size, int) else None

"""Makes of a whole graph that of one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from trtforge import wire
from trtforge.builder.sharding.cut import Cut
from trtforge.builder.sharding.experts import expert_cuts, without_down_bias
from trtforge.builder.sharding.plan import ShardPlan
from trtforge.builder.sharding.rank_graph import RankGraph
from trtforge.builder.sharding.rules import constant, sizes_of, slice_start, weight_axis
from trtforge.builder.sharding.token_embedding import divide_embedding, is_token_embedding
from trtforge.builder.weights import WeightSource
from trtforge.errors import ExportError


def rewrite(
    graph: ir.Graph, plan: ShardPlan, rank: int, sources: Mapping[str, WeightSource]
) -> dict[str, WeightSource]:
    """Change `graph`, for which `plan` was made, into that of `rank`.

    `sources` are those of the graph's weights; returns those that its weights have now.
    """
    rewriter = _Rewriter(graph, plan, rank, sources)
    rewriter.rewrite()
    return rewriter.graph.sources


class _Rewriter:
    def __init__(
        self, graph: ir.Graph, plan: ShardPlan, rank: int, sources: Mapping[str, WeightSource]
    ) -> None:
        self.graph = RankGraph(graph, rank, sources)
        self._plan = plan
        self._rank = rank

    def rewrite(self) -> None:
        nodes = list(self.graph.graph)
        for node in nodes:
            if node in self._plan.rows:
                self._sum_rows(node, self._plan.rows[node])
            elif node in self._plan.experts:
                self._sum_experts(node)
            elif node in self._plan.reductions:
                self._sum_reduction(node, self._plan.reductions[node])
            elif node in self._plan.inputs:
                self._compute_part(node, self._plan.inputs[node])
            elif is_token_embedding(node):
                divide_embedding(self.graph, node, self._plan.tp)
            else:
                for value in node.inputs:
                    self._check_whole(node, value)
        self._cut_outputs()
        for value, cut in self._plan.cuts.items():
            self._set_local_shape(value, cut)
        self.graph.finish()

    # ------------------------------------------------------------------ parts

    def _compute_part(self, node: ir.Node, inputs: Sequence[Cut | None]) -> None:
        """The node computes its part of the output out of parts of its inputs."""
        sizes = self._new_sizes(node)
        for index, cut in enumerate(inputs):
            if cut is None:
                self._check_whole(node, node.inputs[index])
            else:
                self._provide(node, index, cut)
        for index, numbers in sizes.items():
            node.replace_input_with(index, self.graph.integers(numbers))

    def _provide(self, node: ir.Node, index: int, cut: Cut) -> None:
        """Let the node's input be what `cut` says."""
        value = node.inputs[index]
        if value is None:
            return
        have = self._plan.cuts.get(value)
        if have is None:
            node.replace_input_with(index, self.graph.part_of(node, value, cut))
        elif have.axis != cut.axis or have.within(cut.window).ranges != cut.ranges:
            raise ExportError(
                f"the node {node.name} ({node.op_type}) needs other parts of {value.name} than there are"
            )

    def _new_sizes(self, node: ir.Node) -> dict[int, list[int]]:
        """Inputs of the node that say sizes or places, and what they are of the rank's part."""
        cut = self._plan.cuts.get(node.outputs[0])
        if cut is None or node.domain:
            return {}
        if node.op_type in ("Reshape", "Expand"):
            shape = constant(node.inputs[1]) or []
            axis = cut.axis - len(sizes_of(node.outputs[0]) or []) + len(shape)
            follows = (-1, 1) if node.op_type == "Expand" else (-1,)  # takes the size that there is
            if axis < 0 or shape[axis] in follows:
                return {}
            return {1: [cut.local_size(self._rank) if i == axis else size for i, size in enumerate(shape)]}
        before, num_dims = self._plan.inputs[node][0], len(sizes_of(node.inputs[0]) or [])
        if before is None:
            return {}
        along = (
            [axis % num_dims for axis in constant(node.inputs[3]) or []] if node.op_type == "Slice" else []
        )
        if cut.axis in along:
            have = self._plan.cuts.get(node.inputs[0], before)
            start = slice_start(node, cut.axis) or 0
            return {1: [have.local(self._rank, start)], 2: [have.local(self._rank, start + cut.size)]}
        if node.op_type == "Split" and int(node.attributes["axis"].value) % num_dims == cut.axis:
            return self._split_sizes(node)
        return {}

    def _split_sizes(self, node: ir.Node) -> dict[int, list[int]]:
        node.attributes.pop("num_outputs", None)
        if len(node.inputs) < 2:
            node.resize_inputs(2)
        cuts = [self._plan.cuts.get(output) for output in node.outputs]
        return {1: [cut.local_size(self._rank) if cut is not None else 0 for cut in cuts]}

    def _check_whole(self, node: ir.Node, value: ir.Value | None) -> None:
        if value is not None and value in self._plan.cuts:
            raise ExportError(
                f"the node {node.name} ({node.op_type}) needs all of {value.name}, of which ranks have "
                "parts: build the model with --tp 1"
            )

    def _cut_outputs(self) -> None:
        """Where logits could not be computed in part, what the rank does not give is left out."""
        outputs = self.graph.graph.outputs
        for index, output in enumerate(outputs):
            if output.name == wire.LOGITS and output not in self._plan.cuts:
                part = self.graph.part_of(None, output, Cut.of(1, self._plan.logits))
                output.name, part.name = f"{wire.LOGITS}_whole", wire.LOGITS
                outputs[index] = part

    def _set_local_shape(self, value: ir.Value, cut: Cut) -> None:
        shape = list(value.shape)
        shape[cut.axis] = cut.local_size(self._rank)
        value.shape = ir.Shape(shape)

    # ------------------------------------------------------------------ sums over ranks

    def _sum_rows(self, node: ir.Node, cut: Cut) -> None:
        """A projection of a part of its input: ranks add up their products, then comes the bias."""
        self._provide(node, 0, cut)
        weight = self.graph.part_of(node, node.inputs[1], cut.at(weight_axis(node, of_outputs=False)))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        total = self.graph.all_reduce(node, self.graph.copy(node, [node.inputs[0], weight]))
        if bias is not None:
            total = self.graph.add(node, "Add", [total, bias], total)
        self.graph.replace(node, total)

    def _sum_experts(self, node: ir.Node) -> None:
        cuts = expert_cuts(node, self._plan.experts[node])
        inputs = [
            value if cut is None or value is None else self.graph.part_of(node, value, cut)
            for value, cut in zip(node.inputs, cuts, strict=True)
        ]
        if self._rank > 0:
            inputs = without_down_bias(inputs)
        self.graph.replace(node, self.graph.all_reduce(node, self.graph.copy(node, inputs)))

    def _sum_reduction(self, node: ir.Node, cut: Cut) -> None:
        """Ranks add up what their parts sum up to; an element that several ranks have counts once."""
        self._provide(node, 0, cut)
        part, result = node.inputs[0], node.outputs[0]
        copies = cut.copies
        if max(copies) > 1:
            shares = np.array([1 / count if count else 0 for count in copies])
            local = np.concatenate([shares[start:stop] for start, stop in cut.ranges[self._rank]])
            local = local.reshape(-1, *[1] * (len(part.shape) - cut.axis - 1))
            part = self.graph.add(node, "Mul", [part, self.graph.numbers(local, part.dtype)], part)
        total = self.graph.add(node, "ReduceSum", [part, node.inputs[1]], result, {"keepdims": 1})
        total = self.graph.all_reduce(node, total)
        if node.op_type == "ReduceMean":
            share = self.graph.numbers(np.array(1 / cut.size), result.dtype)
            total = self.graph.add(node, "Mul", [total, share], result)
        self.graph.replace(node, total)

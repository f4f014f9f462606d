"""A rank's graph while it is made: nodes and weights that take the place of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from trtforge.builder.sharding.cut import Cut, Ranges
from trtforge.builder.sharding.weights import take
from trtforge.builder.weights import WeightSource, make_tensor
from trtforge.plugins.all_reduce.op import ALL_REDUCE
from trtforge.plugins.op import DOMAIN, Array, AttributeValue


class RankGraph:
    """Edits `graph` in place. New nodes stand before the node that they are made for."""

    def __init__(self, graph: ir.Graph, rank: int, sources: Mapping[str, WeightSource]) -> None:
        self.graph = graph
        self.rank = rank
        self.sources = dict(sources)
        self._parts: dict[tuple[ir.Value, int, Ranges], ir.Value] = {}
        self._new_initializers: list[tuple[ir.Value, WeightSource | None]] = []
        self._count = 0

    def add(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        attributes: Mapping[str, AttributeValue] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The output of a new node before `node`; it has the type and shape of `like`."""
        new = ir.node(op_type, inputs, attributes or {}, domain=domain)
        self.graph.insert_before(node, new)
        return self._describe(new.outputs[0], op_type, like.type, like.shape)

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """The output of a node like `node`, before it, with other inputs."""
        new = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()))
        self.graph.insert_before(node, new)
        old = node.outputs[0]
        return self._describe(new.outputs[0], node.op_type, old.type, old.shape)

    def all_reduce(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The sum of `value` over the ranks, before `node`."""
        return self.add(node, ALL_REDUCE.name, [value], value, ALL_REDUCE.node_attributes(), DOMAIN)

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """`value` takes the place of the node's output, and the node goes."""
        old = node.outputs[0]
        value.name, value.type, value.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """A constant for sizes and places."""
        return self._constant(ir.tensor(np.array(numbers, np.int64)))

    def numbers(self, array: Array, dtype: ir.DataType) -> ir.Value:
        """A constant of `dtype`."""
        return self._constant(ir.tensor(array.astype(dtype.numpy()), dtype=dtype))

    def part_of(self, node: ir.Node | None, value: ir.Value, cut: Cut) -> ir.Value:
        """The rank's part of a value that is whole: of a weight or constant another one, else computed before
        `node`; at the end of the graph without."""
        ranges = cut.ranges[self.rank]
        key = value, cut.axis, ranges
        if key not in self._parts:
            is_constant = value.is_initializer()
            self._parts[key] = self._part(value, cut) if is_constant else self._slice(node, value, cut)
        return self._parts[key]

    def finish(self) -> None:
        """Drop weights without use, and give the new ones their names."""
        initializers = self.graph.initializers
        for name, value in list(initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del initializers[name]
                self.sources.pop(name, None)
        for value, source in self._new_initializers:
            if value.name in initializers:  # all of it is in use as well
                value.name = self._new_name(value.name)
            self.graph.register_initializer(value)
            if source is not None:
                self.sources[value.name] = source

    # ------------------------------------------------------------------ values

    def _part(self, value: ir.Value, cut: Cut) -> ir.Value:
        ranges = cut.ranges[self.rank]
        source = self.sources.get(value.name)
        if source is not None:
            source = take(source, cut.axis, ranges)
            tensor = make_tensor(value.dtype, source)
        else:
            indices = [index for start, stop in ranges for index in range(start, stop)]
            array = np.take(value.const_value.numpy(), indices, cut.axis)
            tensor = ir.tensor(array, dtype=value.dtype)
        part = ir.Value(name=value.name, type=value.type, shape=tensor.shape, const_value=tensor)
        self._new_initializers.append((part, source))
        return part

    def _slice(self, node: ir.Node | None, value: ir.Value, cut: Cut) -> ir.Value:
        parts = []
        for start, stop in cut.ranges[self.rank]:
            inputs = [value, *(self.integers([number]) for number in (start, stop, cut.axis))]
            parts.append(self._sized(node, "Slice", inputs, value, cut.axis, stop - start, {}))
        if len(parts) == 1:
            return parts[0]
        return self._sized(
            node, "Concat", parts, value, cut.axis, cut.local_size(self.rank), {"axis": cut.axis}
        )

    def _sized(
        self,
        node: ir.Node | None,
        op_type: str,
        inputs: Sequence[ir.Value],
        like: ir.Value,
        axis: int,
        size: int,
        attributes: Mapping[str, AttributeValue],
    ) -> ir.Value:
        new = ir.node(op_type, inputs, attributes)
        if node is None:
            self.graph.append(new)
        else:
            self.graph.insert_before(node, new)
        shape = ir.Shape(size if index == axis else dim for index, dim in enumerate(like.shape))
        return self._describe(new.outputs[0], op_type, like.type, shape)

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=self._new_name("const"),
            type=ir.TensorType(tensor.dtype),
            shape=tensor.shape,
            const_value=tensor,
        )
        self._new_initializers.append((value, None))
        return value

    def _describe(
        self, value: ir.Value, name: str, kind: ir.TypeProtocol | None, shape: ir.Shape | None
    ) -> ir.Value:
        value.name, value.type = self._new_name(name), kind
        value.shape = None if shape is None else ir.Shape(shape)
        return value

    def _new_name(self, name: str) -> str:
        self._count += 1
        return f"{name}.shard{self._count}"

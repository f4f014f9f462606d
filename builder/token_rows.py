"""Graphs in which a token is a row: [T, hidden] in place of the [T, 1, hidden] that Hugging Face computes.

Models are traced with batches of one token each. Runtimes broadcast weights to the third dim, and views go
between the two forms around every projection: layers that TensorRT has to be built of.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from trtforge.builder.graph_edits import append_before, constant_ints, rank_of

# Broadcast as numpy does, so that a dim which is 1 everywhere can be left out.
ELEMENTWISE = {
    "Abs", "Add", "And", "Cast", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "Identity", "Less", "LessOrEqual", "Log", "Max", "Min", "Mul", "Neg",
    "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Softplus", "Sqrt", "Sub",
    "Tanh", "Where",
}  # fmt: skip
_ALONG_LAST_AXIS = {"Softmax", "LayerNormalization", "RMSNormalization"}
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"}
_AXIS = 1


def drop_unit_axis(model: ir.Model) -> None:
    """Leave out the axis 1 that an Unsqueeze brings, up to where a node needs it; unused nodes stay."""
    _UnitAxis(model.graph).drop()


class _UnitAxis:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        # What each value with a unit axis 1 is without it; and such values made whole again.
        self._rows: dict[ir.Value, ir.Value] = {}
        self._whole: dict[ir.Value, ir.Value] = {}

    def drop(self) -> None:
        for node in list(self._graph):
            if node.op_type == "Unsqueeze" and constant_ints(node.inputs[1]) == [_AXIS]:
                self._rows[node.outputs[0]] = node.inputs[0]
            elif any(value in self._rows for value in node.inputs if value is not None):
                self._rewrite(node)

    def _rewrite(self, node: ir.Node) -> None:
        (out, *others) = node.outputs
        if self._ends_axis(node):
            return
        # With two dims the axis would be the last one, which others are broadcast to.
        takes_rows = (rank_of(out) or 0) > 2 and not out.is_graph_output()
        if takes_rows and not any(other.uses() for other in others):
            rule = _RULES.get(node.op_type)
            inputs = None if rule is None else rule(self, node)
            if inputs is not None:
                rows = append_before(node, node.op_type, inputs, node.attributes, node.domain)
                rows.dtype = out.dtype
                if out.shape is not None:
                    rows.shape = ir.Shape(dim for axis, dim in enumerate(out.shape) if axis != _AXIS)
                self._rows[out] = rows
                return
        for index, value in enumerate(node.inputs):
            if value in self._rows:
                node.replace_input_with(index, self._made_whole(node, value))

    def _ends_axis(self, node: ir.Node) -> bool:
        """Whether the axis ends with this node, which then has no use any more."""
        rows, out = self._rows.get(node.inputs[0]), node.outputs[0]
        if rows is None or out.is_graph_output():
            return False
        if node.op_type == "Squeeze" and constant_ints(node.inputs[1]) == [_AXIS]:
            out.replace_all_uses_with(rows)
            return True
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [0, 2, 1, 3]:
            moved = append_before(node, "Unsqueeze", [rows, [2]])
            moved.dtype, moved.shape = out.dtype, out.shape
            out.replace_all_uses_with(moved)
            return True
        return False

    def _made_whole(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if value not in self._whole:
            whole = append_before(node, "Unsqueeze", [self._rows[value], [_AXIS]])
            whole.dtype, whole.shape = value.dtype, value.shape
            self._whole[value] = whole
        return self._whole[value]

    # ----------------------------------------------------------------- rules: the inputs without the axis

    def _elementwise(self, node: ir.Node) -> list[ir.Value | None] | None:
        inputs = [value if value is None else self._rows.get(value, value) for value in node.inputs]
        for value in node.inputs:
            if value is not None and value not in self._rows and rank_of(value) not in (0, 1):
                return None
        return inputs

    def _along_last_axis(self, node: ir.Node) -> list[ir.Value | None] | None:
        return self._elementwise(node) if node.attributes.get_int("axis", -1) == -1 else None

    def _reduction(self, node: ir.Node) -> list[ir.Value | None] | None:
        axes = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes != [-1]:
            return None
        return [self._rows[node.inputs[0]], node.inputs[1]]

    def _mat_mul(self, node: ir.Node) -> list[ir.Value | None] | None:
        x, weight = node.inputs
        return [self._rows[x], weight] if x in self._rows and rank_of(weight) == 2 else None

    def _rounding(self, node: ir.Node) -> list[ir.Value | None] | None:
        return self._elementwise(node) if rank_of(node.inputs[1]) == 0 else None

    def _gather(self, node: ir.Node) -> list[ir.Value | None] | None:
        data, indices = node.inputs
        if node.attributes.get_int("axis", 0) != 0 or (data in self._rows) == (indices in self._rows):
            return None
        if data in self._rows and rank_of(indices) != 1:
            return None
        return [self._rows.get(data, data), self._rows.get(indices, indices)]

    def _reshape(self, node: ir.Node) -> list[ir.Value | list[int]] | None:
        sizes = constant_ints(node.inputs[1])
        if sizes is None or len(sizes) < 2 or sizes[0] > 0 or 0 in sizes[2:]:
            return None
        if sizes[_AXIS] not in (0, 1):  # 0: as before
            return None
        return [self._rows[node.inputs[0]], sizes[:_AXIS] + sizes[_AXIS + 1 :]]


_Rule = Callable[[_UnitAxis, ir.Node], "list[ir.Value | None] | list[ir.Value | list[int]] | None"]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(ELEMENTWISE, _UnitAxis._elementwise),
    **dict.fromkeys(_ALONG_LAST_AXIS, _UnitAxis._along_last_axis),
    **dict.fromkeys(_REDUCTIONS, _UnitAxis._reduction),
    "DistCollective": _UnitAxis._elementwise,  # of TensorRT: between ranks, whatever the shape
    "QuantizeLinear": _UnitAxis._rounding,
    "DequantizeLinear": _UnitAxis._rounding,
    "MatMul": _UnitAxis._mat_mul,
    "Gather": _UnitAxis._gather,
    "Reshape": _UnitAxis._reshape,
}

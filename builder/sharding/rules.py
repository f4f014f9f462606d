"""What a node needs of its inputs to compute a part of its output, operator by operator.

A rule is given the cut of each output, None for one that is to be whole, and returns that of each input. It
returns None where the node cannot compute that part alone. Shapes are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from trtforge.builder.sharding.cut import Cut, combine
from trtforge.plugins.op import DOMAIN

Cuts: TypeAlias = Sequence[Cut | None]
Rule: TypeAlias = Callable[[ir.Node, Cuts], Cuts | None]

_ARITHMETIC = frozenset(["Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"])
_FUNCTIONS = frozenset(
    ["Cos", "Erf", "Exp", "Gelu", "HardSwish", "Relu", "Sigmoid", "Sin", "Softplus", "Tanh"]
)
_CHOICES = frozenset(["Cast", "CastLike", "Identity", "Where"])
ELEMENTWISE = _ARITHMETIC | _FUNCTIONS | _CHOICES
REDUCTIONS = frozenset(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"])
# Operators that work along one axis, the attribute `axis`, and along those after it for some.
_ALONG_AXIS = frozenset(["Softmax", "LayerNormalization", "RMSNormalization"])


def rule_of(node: ir.Node) -> Rule | None:
    """None for operators of which nothing is known here."""
    if node.domain == DOMAIN:
        return _linear if node.op_type == "Linear" else None
    if node.domain:
        return None
    return _elementwise if node.op_type in ELEMENTWISE else _RULES.get(node.op_type)


def is_projection(node: ir.Node) -> bool:
    """Whether the node multiplies by a matrix of weights."""
    is_matrix = (node.domain, node.op_type) in ((DOMAIN, "Linear"), ("", "Gemm"), ("", "MatMul"))
    if not is_matrix or len(node.inputs) < 2:
        return False
    weight = node.inputs[1]
    scales_bias = "beta" in node.attributes and node.attributes["beta"].value != 1
    is_plain = not _attribute(node, "transA", 0) and not scales_bias
    return bool(is_plain and weight.is_initializer() and len(weight.shape) == 2)


def weight_axis(node: ir.Node, *, of_outputs: bool) -> int:
    """The axis of a projection's weight that its outputs, or its inputs, are along."""
    outputs_first = node.domain == DOMAIN or bool(_attribute(node, "transB", 0))
    return int(outputs_first != of_outputs)


def constant(value: ir.Value | None) -> list[int] | None:
    """The integers that `value` holds; None if it is no constant."""
    if (
        value is None
        or value.const_value is None
        or value.dtype not in (ir.DataType.INT64, ir.DataType.INT32)
    ):
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def sizes_of(value: ir.Value) -> list[int | str | None] | None:
    """The dims of `value`, symbolic ones as their names; None if they are unknown."""
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def elementwise_cut(value: ir.Value | None, num_dims: int, cut: Cut) -> Cut | None:
    """The cut of an input for that of the output, which has `num_dims`; None where it is broadcast."""
    sizes = sizes_of(value) if value is not None else []
    if sizes is None:
        return None
    axis = cut.axis - num_dims + len(sizes)
    return cut.at(axis) if axis >= 0 and sizes[axis] == cut.size else None


def reduced_axis(node: ir.Node) -> int | None:
    """The one axis that a reduction takes together while it keeps its place; None for other nodes."""
    if node.domain or node.op_type not in REDUCTIONS or not _attribute(node, "keepdims", 1):
        return None
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    sizes = sizes_of(node.inputs[0])
    return None if axes is None or len(axes) != 1 or sizes is None else axes[0] % len(sizes)


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].value) if name in node.attributes else default


def _only(outputs: Cuts) -> Cut | None:
    return outputs[0] if len(outputs) == 1 else None


def _elementwise(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut, sizes = _only(outputs), sizes_of(node.outputs[0])
    if cut is None or sizes is None:
        return None
    if any(value is not None and value.shape is None for value in node.inputs):
        return None
    inputs = [elementwise_cut(value, len(sizes), cut) for value in node.inputs]
    return [inputs[0], None] if node.op_type == "CastLike" else inputs


def _linear(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut, sizes = _only(outputs), sizes_of(node.outputs[0])
    if cut is None or sizes is None or cut.axis != len(sizes) - 1 or not is_projection(node):
        return None
    inputs = [None, cut.at(weight_axis(node, of_outputs=True))]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if len(node.inputs[2].shape) != 1:
            return None
        inputs.append(cut.at(0))
    return inputs


def _reshape(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut = _only(outputs)
    before, after = sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
    shape = constant(node.inputs[1])
    if cut is None or before is None or after is None or shape is None or 0 in shape:
        return None
    inner = _product(after[cut.axis + 1 :])
    for axis, size in enumerate(before):
        behind = _product(before[axis + 1 :])
        if size != 1 and isinstance(size, int) and inner and behind and size * behind == cut.size * inner:
            found = cut.scaled(axis, inner, behind)
            return None if found is None else [found, None]
    return None


def _product(sizes: Sequence[int | str | None]) -> int | None:
    product = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        product *= size
    return product


def _transpose(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut = _only(outputs)
    permutation = node.attributes["perm"].value if "perm" in node.attributes else None
    return None if cut is None or permutation is None else [cut.at(permutation[cut.axis])]


def _squeeze(node: ir.Node, outputs: Cuts) -> Cuts | None:
    """Also Unsqueeze."""
    cut, axes = _only(outputs), constant(node.inputs[1]) if len(node.inputs) > 1 else None
    before, after = sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
    if cut is None or axes is None or before is None or after is None:
        return None
    longer = max(len(before), len(after))
    removed = {axis % longer for axis in axes}
    kept = [axis for axis in range(longer) if axis not in removed]
    if len(before) < len(after):  # Unsqueeze
        return [cut.at(kept.index(cut.axis)), None] if cut.axis in kept else None
    return [cut.at(kept[cut.axis]), None]


def slice_start(node: ir.Node, axis: int) -> int | None:
    """Where a Slice along `axis` begins, 0 if it is along others; None if that is not known or not simple."""
    starts, axes, steps = (constant(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 3, 4))
    sizes = sizes_of(node.inputs[0])
    if starts is None or axes is None or sizes is None:
        return None
    if axis not in [other % len(sizes) for other in axes]:
        return 0
    size = sizes[axis]
    if len(axes) != 1 or not isinstance(size, int) or steps not in (None, [1]):
        return None
    return min(starts[0] + size if starts[0] < 0 else starts[0], size)


def _slice(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut, sizes = _only(outputs), sizes_of(node.inputs[0])
    if cut is None or sizes is None:
        return None
    start, size = slice_start(node, cut.axis), sizes[cut.axis]
    if start is None or not isinstance(size, int):
        return None
    return [cut.moved(cut.axis, size, start), *[None] * (len(node.inputs) - 1)]


def _split(node: ir.Node, outputs: Cuts) -> Cuts | None:
    sizes = sizes_of(node.inputs[0])
    if sizes is None:
        return None
    along = _attribute(node, "axis", 0) % len(sizes)
    wanted, start = [], 0
    for output, cut in zip(node.outputs, outputs, strict=True):
        part = (sizes_of(output) or sizes)[along]
        if cut is None and output.uses():
            return None
        if not isinstance(part, int):
            return None
        if cut is not None:
            size = sizes[cut.axis]
            if not isinstance(size, int):
                return None
            wanted.append(cut.moved(along, size, start) if cut.axis == along else cut)
        start += part
    found = combine(wanted) if wanted else None
    return None if found is None else [found, *[None] * (len(node.inputs) - 1)]


def _concat(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut, sizes = _only(outputs), sizes_of(node.outputs[0])
    if cut is None or sizes is None or _attribute(node, "axis", 0) % len(sizes) == cut.axis:
        return None
    return [cut] * len(node.inputs)


def _expand(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut, sizes, shape = _only(outputs), sizes_of(node.outputs[0]), constant(node.inputs[1])
    if cut is None or sizes is None or shape is None or node.inputs[0].shape is None:
        return None
    return [elementwise_cut(node.inputs[0], len(sizes), cut), None]


def _reduce(node: ir.Node, outputs: Cuts) -> Cuts | None:
    cut, axis = _only(outputs), reduced_axis(node)
    return None if cut is None or axis is None or axis == cut.axis else [cut, None]


def _along_axis(node: ir.Node, outputs: Cuts) -> Cuts | None:
    """Its weights are of the axes that it works along, which are whole."""
    sizes = sizes_of(node.inputs[0])
    cut = outputs[0]
    if cut is None or sizes is None or cut.axis >= _attribute(node, "axis", -1) % len(sizes):
        return None
    return [cut, *[None] * (len(node.inputs) - 1)]


def _rotary(node: ir.Node, outputs: Cuts) -> Cuts | None:
    """x is [T, heads, tokens, head_dim]; the angles are those of all heads."""
    cut, sizes = _only(outputs), sizes_of(node.inputs[0])
    if cut is None or sizes is None or len(sizes) != 4 or cut.axis != 1:
        return None
    return [cut, *[None] * (len(node.inputs) - 1)]


_RULES: Mapping[str, Rule] = {
    "Concat": _concat,
    "Expand": _expand,
    "Gemm": _linear,
    "MatMul": _linear,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _squeeze,
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(_ALONG_AXIS, _along_axis),
}

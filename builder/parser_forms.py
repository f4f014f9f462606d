"""The forms of a graph that TensorRT's parser makes the fewest layers of.

It adds a layer wherever an operand has fewer dims than another one, and one for each transposed weight that
is not the second operand of a Gemm.
"""

from __future__ import annotations

import onnx_ir as ir

from trtforge.builder.graph_edits import append_before, constant_number, rank_of
from trtforge.builder.token_rows import ELEMENTWISE


def use_parser_forms(model: ir.Model) -> None:
    """Change `model` in place; nodes without a use stay."""
    for node in list(model.graph):
        form = _FORMS.get(node.op_type)
        out = node.outputs[0]
        replacement = form(node) if form is not None and not out.is_graph_output() else None
        if replacement is not None:
            replacement.dtype, replacement.shape = out.dtype, out.shape
            out.replace_all_uses_with(replacement)
    _even_ranks(model.graph)


def _as_gemm(node: ir.Node) -> ir.Value | None:
    x, weight = node.inputs
    transpose = weight.producer()
    if transpose is None or transpose.op_type != "Transpose" or rank_of(x) != 2 or rank_of(weight) != 2:
        return None
    return append_before(node, "Gemm", [x, transpose.inputs[0]], {"transB": 1})


def _as_square(node: ir.Node) -> ir.Value | None:
    base, exponent = node.inputs
    return append_before(node, "Mul", [base, base]) if constant_number(exponent) == 2.0 else None


def _as_quotient(node: ir.Node) -> ir.Value | None:
    for dividend, factor in (node.inputs, node.inputs[::-1]):
        producer = factor.producer()
        if producer is not None and producer.op_type == "Reciprocal":
            return append_before(node, "Div", [dividend, producer.inputs[0]])
    return None


_FORMS = {"MatMul": _as_gemm, "Pow": _as_square, "Mul": _as_quotient}


def _even_ranks(graph: ir.Graph) -> None:
    """Give constants among operands as many dims as the other operands have."""
    made: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in graph:
        # Clip's limits have to be scalars.
        if node.op_type not in ELEMENTWISE or node.op_type == "Clip" or len(node.inputs) < 2:
            continue
        rank = rank_of(node.outputs[0])
        for index, value in enumerate(node.inputs):
            own_rank = rank_of(value)
            if rank is None or own_rank is None or own_rank >= rank or not value.is_initializer():
                continue
            if (value, rank) not in made:
                made[value, rank] = _with_rank(value, rank)
                graph.register_initializer(made[value, rank])
            node.replace_input_with(index, made[value, rank])


def _with_rank(value: ir.Value, rank: int) -> ir.Value:
    """The same constant with dims of 1 in front; what lies in a file stays there."""
    tensor = value.const_value
    name = f"{value.name}_{rank}d"
    sizes = tensor.shape.numpy()
    shape = ir.Shape([1] * (rank - len(sizes)) + list(sizes))
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=shape,
            name=name,
            base_dir=tensor.base_dir,
        )
    else:
        tensor = ir.Tensor(tensor.numpy().reshape(shape.numpy()), dtype=tensor.dtype, name=name)
    return ir.Value(name=name, type=value.type, shape=shape, const_value=tensor)

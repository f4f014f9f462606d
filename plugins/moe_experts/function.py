"""MoeExperts out of standard ONNX operators.

Every expert sees every token, and the router's weights, zero for experts not chosen, add them up. That costs
num_experts / top_k times the arithmetic of a real kernel, but no copy of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import ir

from trtforge.errors import PluginError
from trtforge.plugins.body import Attributes, Body, Inputs

_INT64 = ir.DataType.INT64.value


def write_body(op: Body, inputs: Inputs, attributes: Attributes) -> Sequence[ir.Value]:
    """Nodes that compute `out`."""
    x = op("Unsqueeze", inputs["x"], [0])  # [1, T, hidden]
    hidden = _project(op, x, "gate_up", inputs, attributes)
    hidden = _activate(op, hidden, attributes)  # [E, T, intermediate]
    experts = _project(op, hidden, "down", inputs, attributes)  # [E, T, hidden]
    weighted = op("Mul", experts, op("CastLike", _expert_weights(op, inputs), inputs["x"]))
    return (op("ReduceSum", weighted, [0], keepdims=0),)


def _project(op: Body, x: ir.Value, name: str, inputs: Inputs, attributes: Attributes) -> ir.Value:
    """The product with the weights `name` of all experts, [E, T, out]."""
    weight, bias, offset = inputs[name], inputs[f"{name}_bias"], inputs[f"{name}_offset"]
    if not attributes["transposed"]:
        weight = op("Transpose", weight, perm=[0, 2, 1])
    y = op("MatMul", x, weight)
    if offset is not None:
        y = op("Sub", y, op("MatMul", _sum_groups(op, x, offset), offset))
    return y if bias is None else op("Add", y, op("Unsqueeze", bias, [1]))


def _sum_groups(op: Body, x: ir.Value, offset: ir.Value) -> ir.Value:
    """The sum of each of the groups that `offset` has numbers for, [1 or E, T, groups]."""
    sizes = op("Concat", [0, 0], op("Shape", offset, start=1, end=2), [-1], axis=0)
    return op("ReduceSum", op("Reshape", x, sizes), [3], keepdims=0)


def _expert_weights(op: Body, inputs: Inputs) -> ir.Value:
    """The router's weight of each expert for each token, [E, T, 1]."""
    num_experts = op("Shape", inputs["gate_up"], start=0, end=1)
    experts = op("Range", 0, op("Squeeze", num_experts, [0]), 1)
    indices = op("Unsqueeze", op("Cast", inputs["router_indices"], to=_INT64), [2])
    chosen = op("CastLike", op("Equal", indices, experts), inputs["router_weights"])  # [T, k, E]
    weights = op("Mul", chosen, op("Unsqueeze", inputs["router_weights"], [2]))
    return op("Unsqueeze", op("Transpose", op("ReduceSum", weights, [1], keepdims=0), perm=[1, 0]), [2])


def _activate(op: Body, hidden: ir.Value, attributes: Attributes) -> ir.Value:
    activation = attributes["activation"]
    if activation == "swiglu_oai":
        return _swiglu_oai(op, hidden, float(attributes["alpha"]), float(attributes["limit"]))
    size = op("Div", op("Shape", hidden, start=2, end=3), 2)
    gate = op("Slice", hidden, [0], size, [2])
    up = op("Slice", hidden, size, op("Shape", hidden, start=2, end=3), [2])
    if activation == "silu":
        gate = op("Mul", gate, op("Sigmoid", gate))
    elif activation in ("gelu", "gelu_tanh"):
        gate = op("Gelu", gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    else:
        raise PluginError(f"MoeExperts has no activation {activation!r}")
    return op("Mul", gate, up)


def _swiglu_oai(op: Body, hidden: ir.Value, alpha: float, limit: float) -> ir.Value:
    """(clamp(up) + 1) * gate * sigmoid(alpha * gate), gate at even and up at odd places."""
    end = op("Shape", hidden, start=2, end=3)
    gate = op("Slice", hidden, [0], end, [2], [2])
    up = op("Slice", hidden, [1], end, [2], [2])
    low, high = (op("CastLike", bound, hidden) for bound in (-limit, limit))
    gate = op("Min", gate, high)
    up = op("Add", op("Clip", up, low, high), op("CastLike", 1.0, hidden))
    return op("Mul", up, op("Mul", gate, op("Sigmoid", op("Mul", gate, op("CastLike", alpha, hidden)))))

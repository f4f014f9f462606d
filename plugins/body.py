"""A small notation for ONNX functions of standard operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnxscript import ir

from trtforge.plugins.op import AttributeValue

STANDARD_OPSET = 23

Operand: TypeAlias = Any  # ir.Value, None for an input left out, int, float or a list of ints
Constant: TypeAlias = AttributeValue | Sequence[int]


class Body:
    """Collects the nodes of a function: `body("Add", x, 1)` appends an Add and returns its output.

    Numbers among the operands become constants: an int or a list of ints int64 of rank 0 or 1, a float
    float32 of rank 0.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *operands: Operand, **attributes: Constant) -> ir.Value:
        inputs = [x if x is None or isinstance(x, ir.Value) else self._constant(x) for x in operands]
        node = ir.node(op_type, inputs, attributes)
        self.nodes.append(node)
        (output,) = node.outputs
        return output

    def _constant(self, value: int | float | Sequence[int]) -> ir.Value:
        array = np.array(value, dtype=np.float32 if isinstance(value, float) else np.int64)
        node = ir.node("Constant", [], {"value": ir.tensor(array)})
        self.nodes.append(node)
        return node.outputs[0]


Inputs = Mapping[str, ir.Value | None]  # by name; None for an optional input that is not given
Attributes = Mapping[str, AttributeValue]
# Writes a function's nodes and returns its outputs.
WriteBody = Callable[[Body, Inputs, Attributes], Sequence[ir.Value]]

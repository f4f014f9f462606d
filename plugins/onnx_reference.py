"""Runs graphs with custom operators in `onnx.reference`, by the operators' own references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx.reference.op_run import OpRun

from trtforge.plugins.op import DOMAIN, Array
from trtforge.plugins.operator import Operator
from trtforge.plugins.operators import OPERATORS


def reference_ops() -> Sequence[type[OpRun]]:
    """What `ReferenceEvaluator(model, new_ops=...)` takes; graphs stay as the builder wrote them."""
    return [_op_run(operator) for operator in OPERATORS.values()]


def _op_run(operator: Operator) -> type[OpRun]:
    names = {attribute.name for attribute in operator.spec.attributes}

    def run(self: OpRun, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        given = {name: value for name, value in attributes.items() if name in names and value is not None}
        outputs = operator.reference(*inputs, **given)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    # The evaluator finds an operator by its class's name and domain.
    return type(operator.spec.name, (OpRun,), {"op_domain": DOMAIN, "_run": run})

"""Kernels get from torch tensors what they need to compute what the operator's reference computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness.launcher import InterpreterLauncher

from trtforge.plugins.int4_gemm.cases import CASES, exact_inputs
from trtforge.plugins.operators import OPERATORS
from trtforge.runtime.executors.torch_graph import Node
from trtforge.runtime.executors.torch_operators import Operators


@pytest.mark.parametrize("case", ["group-32", "one-token-split", "act-order"])
def test_int4_gemm(case: str) -> None:
    """Of an activation as graphs have it, [T, 1, in_features], and not contiguous."""
    operator = OPERATORS["Int4Gemm"]
    arrays = exact_inputs(CASES[case], np.float16)
    names = [tensor.name if tensor.name in arrays else "" for tensor in operator.spec.inputs]
    inputs = [torch.from_numpy(arrays[name]) if name else None for name in names]
    x = inputs[0].T.contiguous().T.unsqueeze(1)
    operators = Operators(InterpreterLauncher())
    y, *_ = operators.make(Node("Int4Gemm", "trtforge", tuple(names), ("y",), {}))(x, *inputs[1:])
    expected = operator.reference(*(arrays.get(tensor.name) for tensor in operator.spec.inputs))
    assert operators.waiting == set()
    np.testing.assert_array_equal(y.squeeze(1).numpy(), expected)

"""Standard operators in torch compute what ONNX Runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from trtforge.errors import ConfigError
from trtforge.plugins.body import STANDARD_OPSET
from trtforge.runtime.executors.torch_experts import DequantizedExperts
from trtforge.runtime.executors.torch_graph import STANDARD_OPS

Arrays = tuple[np.ndarray | None, ...]

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
POSITIVE = np.abs(X) + np.float32(0.1)
EXPERTS = RNG.integers(-128, 128, (2, 6, 4)).astype(np.int8)
HEADS = RNG.normal(size=(2, 3, 5, 8)).astype(np.float32)
ANGLES = RNG.normal(size=(2, 5, 4)).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


CASES: list[tuple[str, Arrays, dict[str, Any]]] = [
    ("Add", (X, X[:1, :, :1]), {}),
    ("Sub", (number(1.5), X), {}),
    ("Mul", (X, number(-2.5)), {}),
    ("MatMul", (X, X[0].T.copy()), {}),
    ("And", (X > 0, X < 1), {}),
    ("Less", (X, number(0.5)), {}),
    ("GreaterOrEqual", (X, X[0]), {}),
    ("Div", (X, POSITIVE), {}),
    ("Div", (ints(7, -7, 7, -7), ints(2, 2, -2, -2)), {}),
    ("Pow", (X, number(2.0)), {}),
    ("Pow", (X, number(3.0)), {}),
    ("Pow", (POSITIVE, X), {}),
    ("Sqrt", (POSITIVE,), {}),
    ("Reciprocal", (POSITIVE,), {}),
    ("Sigmoid", (X,), {}),
    ("Tanh", (X,), {}),
    ("Relu", (X,), {}),
    ("Cos", (X,), {}),
    ("Sin", (X,), {}),
    ("Gelu", (X,), {}),
    ("Gelu", (X,), {"approximate": "tanh"}),
    ("Not", (X > 0,), {}),
    ("Where", (X > 0, X, number(-np.inf)), {}),
    ("Cast", (X * 3,), {"to": TensorProto.INT64}),
    ("Cast", (X.round(),), {"to": TensorProto.BOOL}),
    ("Cast", (X,), {"to": TensorProto.FLOAT16}),
    ("DequantizeLinear", (EXPERTS, X), {"axis": 1, "block_size": 2}),
    (
        "DequantizeLinear",
        (EXPERTS.swapaxes(1, 2).copy(), X.swapaxes(1, 2).copy()),
        {"axis": 2, "block_size": 2},
    ),
    ("Gemm", (X[0], X[1].T.copy(), X[0, :, :3]), {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", (X[0], X[1]), {"transB": 1}),
    ("Gemm", (X[0], X[1], X[0, 0]), {"transA": 1, "alpha": 2.0}),
    ("ReduceMean", (X, ints(-1)), {}),
    ("ReduceMean", (X, ints(0, 2)), {"keepdims": 0}),
    ("ReduceSum", (X,), {}),
    ("ReduceSum", (X,), {"noop_with_empty_axes": 1}),
    ("ReduceSum", (X, ints(1)), {"keepdims": 0}),
    ("Softmax", (X,), {"axis": 1}),
    ("LayerNormalization", (X, X[0, 0], X[1, 0]), {"epsilon": 1e-3}),
    ("LayerNormalization", (X, X[0]), {"axis": 1}),
    ("RotaryEmbedding", (HEADS, ANGLES, ANGLES * 2), {}),
    ("RotaryEmbedding", (HEADS, ANGLES, ANGLES * 2), {"interleaved": 1}),
    (
        "RotaryEmbedding",
        (HEADS, ANGLES[..., :2].copy(), ANGLES[..., 2:].copy()),
        {"interleaved": 1, "rotary_embedding_dim": 4},
    ),
    (
        "RotaryEmbedding",
        (HEADS, ANGLES[..., :2].copy(), ANGLES[..., 2:].copy()),
        {"rotary_embedding_dim": 4},
    ),
    ("Shape", (X,), {}),
    ("Shape", (X,), {"start": 1, "end": -1}),
    ("Reshape", (X, ints(0, -1)), {}),
    ("Reshape", (X[:0], ints(0, 12)), {"allowzero": 1}),
    ("Squeeze", (X[:1, :, :1], ints(0, -1)), {}),
    ("Squeeze", (X[:1, :, :1],), {}),
    ("Unsqueeze", (X, ints(0, -1)), {}),
    ("Unsqueeze", (X, ints(3, 1)), {}),
    ("Expand", (X[:, :, :1], ints(4)), {}),
    ("Expand", (X[:1], ints(5, 2, 1, 4)), {}),
    ("Transpose", (X,), {}),
    ("Transpose", (X,), {"perm": [1, 2, 0]}),
    ("Concat", (X, X[:, :1]), {"axis": -2}),
    ("Split", (X,), {"axis": 1, "num_outputs": 2}),
    ("Split", (X,), {"axis": 2, "num_outputs": 3}),
    ("Split", (X, ints(1, 3)), {"axis": -1}),
    ("Slice", (X, ints(1), ints(2**63 - 1), ints(2), ints(2)), {}),
    ("Slice", (X, ints(-2, 0), ints(-1, 100), ints(1, -1)), {}),
    ("Slice", (X, ints(0, 1), ints(1, 3)), {}),
    ("Pad", (X, ints(0, 1, 0, 0, 0, 3)), {}),
    ("Pad", (X, ints(1, 0, 0, 0, 2, 0), number(1.5)), {"mode": "constant"}),
    ("Range", (np.array(2), np.array(11), np.array(3)), {}),
    ("ConstantOfShape", (ints(2, 3),), {}),
    ("ConstantOfShape", (ints(2, 3),), {"value": numpy_helper.from_array(ints(7))}),
    ("Gather", (X, ints(1, -1, 0).reshape(3, 1)), {"axis": 1}),
    ("Gather", (X, ints(3, -4)), {"axis": -1}),
    ("Gather", (X[0], np.array([[2, 0]], np.int32)), {}),
    ("Gather", (X, np.array(1)), {"axis": 1}),
    ("GatherElements", (X[0], ints(0, -1, 2, 1).reshape(2, 2)), {"axis": 1}),
    ("ScatterElements", (X[0], ints(0, -1, 1).reshape(3, 1), X[1, :, :1]), {"axis": 1}),
    ("ScatterND", (X, ints(1, 0).reshape(2, 1), X * 2), {}),
    ("ScatterND", (X, ints(0, 2, 1, -1).reshape(2, 2), X[0, :2]), {}),
    ("TopK", (X, ints(2)), {}),
    ("TopK", (X, ints(1)), {"axis": 1, "largest": 0}),
]


def run_onnxruntime(op_type: str, arrays: Arrays, attributes: dict[str, Any], num_outputs: int) -> list:
    names = ["" if array is None else f"x{index}" for index, array in enumerate(arrays)]
    outputs = [f"y{index}" for index in range(num_outputs)]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
        if array is not None
    ]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, outputs, **attributes)],
        "test",
        inputs,
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    opset = helper.make_opsetid("", STANDARD_OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
    return session.run(None, feeds)


def as_operand(op_type: str, index: int, array: np.ndarray) -> Any:
    """An input as a compiled graph gives a constant one."""
    if index in STANDARD_OPS[op_type].sizes:
        return array.flatten().tolist()
    if STANDARD_OPS[op_type].takes_numbers and array.ndim == 0:
        return array.item()
    return torch.from_numpy(array)


@pytest.mark.parametrize(("op_type", "arrays", "attributes"), CASES, ids=[case[0] for case in CASES])
def test_operators_equal_onnx_runtime(op_type: str, arrays: Arrays, attributes: dict[str, Any]) -> None:
    operation = STANDARD_OPS[op_type].make(attributes, CPU)
    results = operation(*[as_operand(op_type, index, array) for index, array in enumerate(arrays)])
    results = results if isinstance(results, tuple) else (results,)
    expected = run_onnxruntime(op_type, arrays, attributes, len(results))
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(result, DequantizedExperts):
            result = torch.stack([result[number] for number in range(len(wanted))])
        assert result.numpy().dtype == wanted.dtype
        assert tuple(result.shape) == wanted.shape
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_every_operator_has_a_case() -> None:
    assert {op_type for op_type, _, _ in CASES} == STANDARD_OPS.keys()


@pytest.mark.parametrize(
    ("op_type", "attributes", "said"),
    [
        ("LayerNormalization", {"stash_type": TensorProto.BFLOAT16}, "stash_type"),
        ("Pad", {"mode": "edge"}, "mode edge"),
        ("ScatterND", {"reduction": "add"}, "reduction add"),
        ("Cast", {"to": TensorProto.STRING}, "STRING"),
        (
            "DequantizeLinear",
            {"axis": 0},
            "DequantizeLinear along axis 0, which the reference runtime does not",
        ),
    ],
)
def test_what_is_not_known_is_refused(op_type: str, attributes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        STANDARD_OPS[op_type].make(attributes, CPU)

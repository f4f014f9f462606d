"""What lowering rewrites computes the same, in fewer nodes; ONNX Runtime runs both forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime
import pytest

from trtforge.builder.parser_forms import use_parser_forms
from trtforge.builder.token_rows import drop_unit_axis
from trtforge.builder.views import merge_views
from trtforge.plugins.body import Body

Arrays = Mapping[str, np.ndarray[Any, Any]]
Write = Callable[[Body, Mapping[str, ir.Value]], ir.Value]
RNG = np.random.default_rng(0)
HIDDEN, HEADS = 8, 2


def model_of(write: Write, inputs: Arrays, weights: Arrays) -> ir.Model:
    """A model of one output, with the first dim of inputs open and shapes inferred."""
    op = Body()
    values = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape([f"first_of_{name}", *array.shape[1:]] if name in inputs else array.shape),
            const_value=None if name in inputs else ir.tensor(array, name=name),
        )
        for name, array in (*inputs.items(), *weights.items())
    }
    out = write(op, values)
    out.name, out.type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [values[name] for name in inputs],
        [out],
        nodes=op.nodes,
        initializers=[values[name] for name in weights],
        opset_imports={"": 23},
        name="test",
    )
    model = ir.Model(graph, ir_version=11)
    ir.passes.Sequential(
        passes.NameFixPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.ShapeInferencePass(),
    )(model)
    return model


def run(model: ir.Model, inputs: Arrays) -> np.ndarray[Any, Any]:
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, dict(inputs))
    return np.asarray(out)


def check_same(model: ir.Model, inputs: Arrays, *rewrites: Callable[[ir.Model], None]) -> list[str]:
    """Rewrite `model` and compare; returns the operators that are left, but for constants."""
    expected = run(model, inputs)
    for rewrite in rewrites:
        rewrite(model)
        passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)
    np.testing.assert_allclose(run(model, inputs), expected, atol=1e-6)
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.normal(size=shape).astype(np.float32)


def test_a_layer_is_computed_in_rows() -> None:
    """From token ids through a norm, a projection into heads and back, with a gate and a residual."""

    def write(op: Body, x: Mapping[str, ir.Value]) -> ir.Value:
        hidden = op("Gather", x["embedding"], op("Unsqueeze", x["ids"], [1]), axis=0)  # [T, 1, HIDDEN]
        scale = op("Reciprocal", op("Sqrt", op("ReduceMean", op("Pow", hidden, 2.0), [-1], keepdims=1)))
        normed = op("Mul", x["norm"], op("Mul", hidden, scale))
        heads = op("Reshape", op("MatMul", normed, op("Transpose", x["up"], perm=[1, 0])), [-1, 1, HEADS, 4])
        moved = op("Squeeze", op("Transpose", heads, perm=[0, 2, 1, 3]), [2])  # [T, HEADS, 4]
        back = op("Reshape", op("Unsqueeze", moved, [1]), [-1, 1, HIDDEN])
        gated = op("Softmax", op("Mul", back, op("Sigmoid", back)), axis=-1)
        out = op("Add", hidden, op("MatMul", gated, op("Transpose", x["down"], perm=[1, 0])))
        return op("Neg", op("Squeeze", op("Gather", out, x["rows"], axis=0), [1]))

    inputs = {"ids": np.array([3, 1, 4], np.int32), "rows": np.array([2, 0], np.int32)}
    weights = {
        "embedding": normal(9, HIDDEN),
        "norm": normal(HIDDEN),
        "up": normal(HIDDEN, HIDDEN),
        "down": normal(HIDDEN, HIDDEN),
    }
    model = model_of(write, inputs, weights)
    left = check_same(model, inputs, drop_unit_axis, merge_views, use_parser_forms)
    assert left == [
        *("Gather", "Mul", "ReduceMean", "Sqrt", "Div", "Mul", "Gemm"),
        *("Sigmoid", "Mul", "Softmax", "Gemm", "Add", "Gather", "Neg"),
    ]
    # Nothing is left that a parser would have to broadcast.
    for node in model.graph:
        if node.op_type == "Mul":
            assert {len(value.shape) for value in node.inputs} == {2}


def test_an_axis_that_others_are_broadcast_to_stays() -> None:
    def write(op: Body, x: Mapping[str, ir.Value]) -> ir.Value:
        column = op("Add", op("Unsqueeze", x["a"], [1]), x["row"])  # [T, 5]
        return op("Add", op("Unsqueeze", column, [1]), x["square"])  # [T, 3, 5]

    inputs = {"a": normal(4)}
    model = model_of(write, inputs, {"row": normal(5), "square": normal(3, 5)})
    assert check_same(model, inputs, drop_unit_axis) == ["Unsqueeze", "Add", "Unsqueeze", "Add"]


@pytest.mark.parametrize("axis", [1, -1])
def test_what_works_along_the_axis_gets_it(axis: int) -> None:
    def write(op: Body, x: Mapping[str, ir.Value]) -> ir.Value:
        whole = op("Unsqueeze", op("Sigmoid", x["a"]), [1])
        return op("ReduceSum", op("Neg", whole), [axis], keepdims=0)

    inputs = {"a": normal(4, 5)}
    left = check_same(model_of(write, inputs, {}), inputs, drop_unit_axis)
    assert left == ["Sigmoid", "Neg", "Unsqueeze", "ReduceSum"]


def test_views_of_several_open_dims_are_left() -> None:
    def write(op: Body, x: Mapping[str, ir.Value]) -> ir.Value:
        tall = op("Unsqueeze", op("Reshape", x["a"], [-1, 2, 3]), [0])  # [1, T, 2, 3]
        wide = op("Reshape", op("Expand", tall, op("Concat", op("Shape", x["a"], end=1), [1, 1, 1], axis=0)),
                  [0, 0, 6])  # fmt: skip
        return op("Unsqueeze", wide, [0])

    inputs = {"a": normal(4, 6)}
    left = check_same(model_of(write, inputs, {}), inputs, merge_views)
    assert left == ["Reshape", "Shape", "Concat", "Expand", "Reshape", "Unsqueeze"]


def test_a_weight_in_a_file_gets_dims_and_stays_there(tmp_path: Path) -> None:
    norm = normal(6)
    (tmp_path / "weights").write_bytes(b"1234" + norm.tobytes())
    inputs = {"a": normal(4, 6)}
    model = model_of(lambda op, x: op("Mul", x["a"], x["norm"]), inputs, {"norm": norm})
    (weight,) = (value for value in model.graph.initializers.values() if value.name == "norm")
    weight.const_value = ir.ExternalTensor(
        "weights", 4, norm.nbytes, ir.DataType.FLOAT, shape=ir.Shape([6]), name="norm", base_dir=tmp_path
    )
    use_parser_forms(model)
    (node,) = model.graph
    tensor = node.inputs[1].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (tensor.location, tensor.offset, tensor.length) == ("weights", 4, norm.nbytes)
    np.testing.assert_array_equal(tensor.numpy(), norm[None])


def test_limits_of_a_clip_stay_scalars() -> None:
    inputs = {"a": normal(4, 6)}
    model = model_of(lambda op, x: op("Clip", x["a"], -0.5, 0.5), inputs, {})
    assert check_same(model, inputs, use_parser_forms) == ["Clip"]

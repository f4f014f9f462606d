"""`trtforge compile-kernels`, from a graph or a repository to a bundle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from kernel_harness.scaled_add.op import OPERATOR, SCALED_ADD
from onnx import TensorProto, helper

from trtforge.plugins.bundle import Bundle
from trtforge.plugins.op import DOMAIN
from trtforge.plugins.operators import OPERATORS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_trtforge: Run) -> Run:
    """`run_trtforge` of `trtforge compile-kernels`."""
    return functools.partial(run_trtforge, "compile-kernels")


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ONNX file in which ScaledAdd, as if it was an operator of the package, occurs three times."""
    monkeypatch.setitem(OPERATORS, SCALED_ADD.name, OPERATOR)
    nodes, values = [], []
    for index, kind in enumerate((TensorProto.BFLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT16)):
        names = [f"{name}.{index}" for name in ("total", "x", "total_out")]
        attributes = SCALED_ADD.node_attributes(scale=float(index))
        nodes.append(helper.make_node(SCALED_ADD.name, names[:2], names[2:], domain=DOMAIN, **attributes))
        values.append([helper.make_tensor_value_info(name, kind, ("T", 64)) for name in names])
    inputs = [value for row in values for value in row[:2]]
    model = helper.make_graph(nodes, "test", inputs, [row[2] for row in values])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(model, opset_imports=[helper.make_opsetid(DOMAIN, 1)]), path)
    return path


def test_a_graph_is_compiled(run: Run, graph: Path, tmp_path: Path) -> None:
    status, output, errors = run(graph, "--output", tmp_path / "kernels", "--arch", "sm_90,sm_80", "-j", "1")
    assert status == 0, errors
    assert output.splitlines()[-1] == f"compiled {tmp_path / 'kernels'}"
    assert "compiling 8 kernels" in errors
    entries = Bundle.load(tmp_path / "kernels").manifest.cubins
    # Two sizes of blocks for each of two types: nodes that differ in attributes alone share them.
    for arch in (80, 90):
        kernels = {(e.parameters[0][1], e.constants["BLOCK"]) for e in entries if e.arch == arch}
        assert kernels == {(kind, block) for kind in ("*bf16", "*fp16") for block in (128, 512)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either MODEL or --example NAME"),
        (("model.onnx", "--example", "llama-8b"), "give either MODEL or --example NAME"),
        (("--example", "gpt-5"), "--example 'gpt-5' is not one of llama-8b"),
        (("model.onnx", "--arch", "sm_70"), "'sm_70' is not one of sm_80, sm_89, sm_90, sm_100, sm_120"),
        (("no-such.onnx",), "no-such.onnx does not exist"),
        (("no-such-folder",), "no-such-folder holds no model"),
        (("no-such-folder", "--block-size", "16"), "--block-size goes with an ONNX file"),
    ],
)
def test_wrong_arguments_are_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, output, errors = run(*arguments, "--output", tmp_path / "kernels")
    assert (status, output) == (2, "")
    assert errors.startswith("trtforge: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "kernels").exists()


def test_a_model_that_needs_no_kernels(run: Run, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1,))
    onnx.save(helper.make_model(helper.make_graph([], "empty", [value], [value])), tmp_path / "empty.onnx")
    status, _, errors = run(tmp_path / "empty.onnx", "--output", tmp_path / "kernels")
    assert status == 2
    assert "empty.onnx has kernels: there is nothing to compile" in errors


def test_a_model_must_be_chosen(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "manifest.json").touch()
    status, _, errors = run(tmp_path, "--output", tmp_path / "kernels")
    assert status == 2
    assert f"several models, give one of them: {tmp_path / 'one'}, {tmp_path / 'two'}" in errors


def test_without_the_compiler(run: Run, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        assert name == "triton"

    monkeypatch.setattr("trtforge.plugins.aot.find_spec", find_spec)
    status, _, errors = run(graph, "--output", tmp_path / "kernels")
    assert status == 2
    assert "pip install 'trtforge[kernels]'" in errors
    assert not (tmp_path / "kernels").exists()

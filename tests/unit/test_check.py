"""`trtforge check`: runtimes that compute what a build says, and builds that are not what was built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trtforge.checking import runtimes
from trtforge.checking.comparison import compare, tolerance
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.checking.report import CheckReport
from trtforge.checking.schedule import make_steps, num_blocks
from trtforge.manifest import DType, Manifest
from trtforge.runtime.executor import ModelInputs, ModelOutputs
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor, has_bfloat16

Run = Callable[..., tuple[int, str, str]]
MakeRepository = Callable[[DType], Path]
Export = Callable[[DType], tuple[Path, Manifest]]

WEIGHTS = Path("llm", "1", "rank0", "model.safetensors")


def change_byte(file: Path, offset: int) -> None:
    """Flip the highest bit of one byte, `offset` bytes before the file's end."""
    data = bytearray(file.read_bytes())
    data[-offset] ^= 0x80
    file.write_bytes(data)


# --------------------------------------------------------------------------- the command


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runtimes_compute_what_the_build_says(
    make_repository: MakeRepository, run_trtforge: Run, dtype: DType
) -> None:
    status, output, _ = run_trtforge("check", str(make_repository(dtype)))
    assert status == 0
    for runtime in ("openvino", "reference"):
        assert f"llm in {dtype}: {runtime} against onnxruntime" in output
    assert output.count("pass") == 2 * 3
    assert "FAIL" not in output


def test_rounding_is_told_from_errors(make_repository: MakeRepository) -> None:
    """What bfloat16 rounds off passes as bfloat16, and would not as float32."""
    report = CheckReport.of(make_repository("bfloat16"), "onnxruntime", seed=1)
    openvino = next(each for each in report.runtimes if each.runtime == "openvino")
    assert list(openvino.errors) == ["prefill", "mixed", "decode"]
    assert report.failed == ()
    if has_bfloat16():
        assert min(errors.typical for errors in openvino.errors.values()) > tolerance("float32", "float32", 2)


def test_runtimes_that_do_not_take_the_build(make_repository: MakeRepository, run_trtforge: Run) -> None:
    """Is said of others, and is an error of the one that it was built for."""
    repository = make_repository("float16")
    version = repository / "llm" / "1"
    manifest = Manifest.load(version)
    status, _, errors = run_trtforge("check", str(repository))
    assert status == 2
    assert "float16 is computed wrongly by OpenVINO" in errors
    manifest.model_copy(update={"runtime": "reference"}).save(version)
    status, output, _ = run_trtforge("check", str(repository))
    assert status == 0
    assert "llm in float16: reference against onnxruntime" in output
    assert "Not run by openvino: dtype float16" in output


def test_a_changed_byte_of_a_weight_is_found(make_repository: MakeRepository, run_trtforge: Run) -> None:
    """All runtimes would agree on it."""
    repository = make_repository("float32")
    change_byte(repository / WEIGHTS, 1)
    status, output, errors = run_trtforge("check", str(repository))
    assert (status, output) == (2, "")
    assert f"{repository / WEIGHTS} has other bytes than the build wrote" in errors
    (repository / WEIGHTS).unlink()
    status, _, errors = run_trtforge("check", str(repository))
    assert status == 2
    assert f"{repository / WEIGHTS} is missing" in errors


class _ReadsOtherTokens(OpenVINOExecutor):
    """From token 40 of a sequence on, which only steps after the prefill reach."""

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        ids = np.where(inputs.position_ids < 40, inputs.input_ids, (inputs.input_ids + 1) % 128)
        return super().execute(dataclasses.replace(inputs, input_ids=ids.astype(np.int32)))


def test_a_runtime_that_computes_something_else_is_named(
    make_repository: MakeRepository, run_trtforge: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(manifest: Manifest, model_dir: Path, _: Any) -> OpenVINOExecutor:
        return _ReadsOtherTokens(model_dir, manifest, threads=2)

    monkeypatch.setattr(runtimes, "create_executor", create)
    status, output, errors = run_trtforge("check", str(make_repository("float32")))
    assert status == 4
    assert "is not computed right by openvino" in errors
    rows = [line.split() for line in output.splitlines() if line.startswith("│")]
    verdicts = {words[1]: words[-2] for words in rows}
    assert verdicts == {"prefill": "pass", "mixed": "FAIL", "decode": "FAIL"}


def test_weights_that_are_no_numbers(make_repository: MakeRepository, run_trtforge: Run) -> None:
    """As a checkpoint may have them: the file is what was built."""
    repository = make_repository("float32")
    weights = bytearray((repository / WEIGHTS).read_bytes())
    weights[-4:] = np.float32(np.nan).tobytes()
    (repository / WEIGHTS).write_bytes(weights)
    version = (repository / WEIGHTS).parents[1]
    Manifest.load(version).model_copy(update={"sha256": {}}).save(version)
    status, _, errors = run_trtforge("check", str(repository))
    assert status == 4
    assert "NaN" in errors


def test_another_runtime_can_be_the_measure(make_repository: MakeRepository, run_trtforge: Run) -> None:
    status, output, _ = run_trtforge("check", str(make_repository("float32")), "--against", "openvino")
    assert status == 0
    assert "onnxruntime against openvino" in output


def test_what_cannot_be_checked(
    make_fake_repository: Callable[..., Path], run_trtforge: Run, tmp_path: Path
) -> None:
    status, _, errors = run_trtforge("check", str(tmp_path))
    assert (status, errors.count("\n")) == (2, 1)
    assert f"{tmp_path} holds no build" in errors
    status, _, errors = run_trtforge("check", str(make_fake_repository()))
    assert status == 2
    assert "has no graph" in errors


# --------------------------------------------------------------------------- its parts


def test_the_measure_is_hugging_face_in_float32(
    export_tiny_llama: Export, tiny_llama: Path, drive: Callable[..., Any]
) -> None:
    """With the weights of a bfloat16 build, and nothing else rounded."""
    folder, manifest = export_tiny_llama("bfloat16")
    text = np.random.default_rng(0).integers(manifest.model.vocab_size, size=60).tolist()
    logits = drive(OnnxRuntimeModel(folder, manifest)).run([{"a": text[:50]}, {"a": text[50:]}])["a"]
    hf = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.bfloat16, attn_implementation="eager"
    ).float()
    with torch.no_grad():
        expected = hf(torch.tensor([text])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_errors_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((40, 17), np.float32)
    actual = expected + rng.standard_normal((40, 17), np.float32) / 10
    errors = compare(actual, expected)
    relative = np.sort(np.abs(actual - expected).max(axis=1) / (expected.max(axis=1) - expected.min(axis=1)))
    assert errors.num_rows == 40
    assert errors.max_abs == pytest.approx(np.abs(actual - expected).max())
    assert errors.worst == pytest.approx(relative[-1])
    assert errors.typical == pytest.approx(relative[-5])
    p, q = (torch.log_softmax(torch.from_numpy(logits), dim=1) for logits in (expected, actual))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
    assert errors.max_kl == pytest.approx(float(kl.max()), rel=1e-3)
    same = (actual.argmax(axis=1) == expected.argmax(axis=1)).sum()
    assert errors.top1 == same / 40 < 1

    shifted = compare(expected + 1, expected)
    assert (shifted.top1, shifted.max_kl) == (1, pytest.approx(0, abs=1e-6))
    actual[3, 3] = np.inf
    assert compare(actual, expected).typical == math.inf
    assert compare(np.zeros((2, 5), np.float32), np.zeros((2, 5), np.float32)).worst == 0


@pytest.mark.parametrize(("block_size", "max_model_len"), [(16, 512), (32, 50), (128, 3)])
def test_steps_mix_what_serving_mixes(block_size: int, max_model_len: int) -> None:
    steps = make_steps(5, 100, block_size, max_model_len)
    lengths: dict[bytes, int] = {}
    for step in steps:
        inputs = step.inputs
        num_new = np.diff(inputs.cu_seqlens)
        used = [
            set(row[: -(-length // block_size)].tolist())
            for row, length in zip(inputs.block_tables, inputs.context_lens, strict=True)
        ]
        assert sum(map(len, used)) == len(set.union(*used))  # no block belongs to two
        assert max(map(max, used)) < num_blocks(block_size)
        for row, new, length in zip(inputs.block_tables, num_new, inputs.context_lens, strict=True):
            name = row[:1].tobytes()
            assert length == lengths.get(name, 0) + new <= max_model_len
            lengths[name] = int(length)
        assert len(inputs.logits_indices) == len(inputs.input_ids) == num_new.sum()
        assert 0 <= inputs.input_ids.min() <= inputs.input_ids.max() < 100
    if max_model_len == 512:
        assert {step.kind for step in steps} == {"prefill", "mixed", "decode"}
        mixed = next(step.inputs for step in steps if step.kind == "mixed")
        num_new = np.diff(mixed.cu_seqlens)
        assert {
            (bool(past), bool(new > 1))
            for past, new in zip(mixed.context_lens - num_new, num_new, strict=True)
        } == {
            (True, True),
            (True, False),
            (False, True),
        }
    again = make_steps(5, 100, block_size, max_model_len)
    other = make_steps(6, 100, block_size, max_model_len)
    np.testing.assert_array_equal(steps[0].inputs.input_ids, again[0].inputs.input_ids)
    assert not np.array_equal(steps[0].inputs.input_ids, other[0].inputs.input_ids)

"""`trtforge plan` as a user meets it: a folder with a config and nothing else."""

from __future__ import annotations

import functools
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import LlamaConfig, PretrainedConfig, T5Config

from trtforge.builder.planning.gpus import GPUS
from trtforge.builder.planning.report import PlanReport

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=4096,
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_trtforge: Run) -> Run:
    """`run_trtforge` of `trtforge plan`."""
    return functools.partial(run_trtforge, "plan")


def folder_of(config: PretrainedConfig, tmp_path: Path) -> str:
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    return str(folder)


def test_a_plan_in_words_numbers_and_pictures(run: Run, tmp_path: Path) -> None:
    files = {"--json": tmp_path / "plan.json", "--svg": tmp_path / "plan.svg"}
    outputs = [text for option, file in files.items() for text in (option, str(file))]
    status, output, _ = run(folder_of(CONFIG, tmp_path), "--gpu", "H200", "--tp", "2", *outputs)
    assert status == 0
    report = PlanReport.model_validate(json.loads(files["--json"].read_text()))
    assert (report.dtype, report.max_model_len, report.prediction) == ("bfloat16", 4096, "upper bound")
    assert f"{report.num_parameters:,} parameters" in output
    assert "2 x NVIDIA H200 SXM" in output
    for row in report.sequences:
        assert f"{row.num_sequences:,}" in output
    assert [point.batch for point in report.decode if point.context_len == 1024] == [
        1, 2, 4, 8, 16, 32, 64, 128, 256,
    ]  # fmt: skip
    for point in report.decode:
        assert f"{point.tokens_per_s:,.0f}/s" in output
    svg = ET.parse(files["--svg"]).getroot()
    lines = svg.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * 2  # throughput and latency at 1,024 and 4,096 tokens


def test_what_does_not_fit_is_planned_too(run: Run, tmp_path: Path) -> None:
    model = folder_of(CONFIG, tmp_path)
    status, output, _ = run(model, "--gpu", "rtx4090", "--memory-fraction", "0.001")
    assert status == 0
    assert "Does not fit" in output
    assert "no room" in output
    status, _, errors = run(
        model, "--gpu", "rtx4090", "--memory-fraction", "0.001", "--svg", str(tmp_path / "x")
    )
    assert status == 2
    assert "does not fit" in errors


def test_a_gpu_without_rates_has_no_times(run: Run, tmp_path: Path) -> None:
    status, output, _ = run(folder_of(CONFIG, tmp_path), "--gpu", "mi300x")
    assert status == 0
    assert "No times" in output
    assert "tokens/s" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "h300"), ", ".join(GPUS)),
        (("--gpu", "a100-80gb", "--fp8", "--activations", "dynamic"), "sm_80"),
        (("--gpu", "h200", "--fp8", "--int4"), "one of them"),
        (("--gpu", "h200", "--int4", "--activations", "static"), "--fp8"),
        (("--gpu", "h200", "--tp", "0"), "--tp 0"),
        (("--gpu", "h200", "--tp", "32"), "16 attention heads"),
        (("--gpu", "h200", "--pp", "5"), "4 layers"),
        (("--gpu", "h200", "--max-model-len", "4097"), "4096"),
        (("--gpu", "h200", "--efficiency", "1.5"), "--efficiency 1.5"),
        (("--gpu", "h200", "--memory-fraction", "0"), "--memory-fraction 0"),
        (("--gpu", "h200", "--json", "/nowhere/plan.json"), "/nowhere/plan.json"),
    ],
)
def test_what_cannot_work_is_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    status, _, errors = run(folder_of(CONFIG, tmp_path), *arguments)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "encoder-decoder"),
        (LlamaConfig(quantization_config={"quant_method": "awq", "bits": 4}), "awq"),
    ],
)
def test_what_cannot_be_exported_is_not_planned(
    run: Run, tmp_path: Path, config: PretrainedConfig, message: str
) -> None:
    status, _, errors = run(folder_of(config, tmp_path), "--gpu", "h200", "--max-model-len", "512")
    assert status == 3
    assert message in errors


def test_weights_that_are_there_say_the_dtype(run: Run, tmp_path: Path) -> None:
    folder = folder_of(CONFIG, tmp_path)
    save_file({"model.norm.weight": np.ones(1024, np.float16)}, Path(folder, "part.safetensors"))
    status, output, _ = run(folder, "--gpu", "l40s")
    assert status == 0
    assert "float16" in output
    assert "bfloat16" not in output
    assert "bfloat16" in run(folder, "--gpu", "l40s", "--dtype", "bfloat16")[1]


def test_help(run: Run) -> None:
    status, output, _ = run("--help")
    assert status == 0
    assert "--memory-fraction" in output

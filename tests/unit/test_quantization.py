"""Rounded weights: how far from the original, where in the graph, and that runtimes compute with them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino as ov
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trtforge.builder.build import build
from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import ExportedModel, export_model, write_graph
from trtforge.builder.options import BuildOptions
from trtforge.builder.quantization.calibration import calibrate
from trtforge.builder.quantization.calibration_texts import calibration_texts
from trtforge.builder.quantization.parts import LatestParts, Part
from trtforge.builder.quantization.policy import (
    Lowering,
    Quantization,
    Scales,
    check_exclusions,
    choose_lowering,
)
from trtforge.builder.quantization.rounding import round_weight
from trtforge.builder.repository import VERSION_FOLDER
from trtforge.errors import ConfigError, ExportError
from trtforge.manifest import DType, Manifest
from trtforge.runtime.executor import Executor
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor
from trtforge.runtime.executors.openvino_graph import read_graph
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

Drive = Callable[..., Any]
MakeManifest = Callable[..., Manifest]

TEXT = np.random.default_rng(0).integers(128, size=50).tolist()
EXCLUDED = "model.layers.1.self_attn.*"


def some_weight(out_features: int = 40, in_features: int = 128) -> torch.Tensor:
    """Rows that differ in size, with some large numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.linspace(0.01, 3, out_features)[:, None]
    weight[::7, ::11] *= 6
    weight[3] = 0
    return weight


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_nearer_than_the_range_of_each_group_makes_it(group_size: int) -> None:
    weight = some_weight()
    rounded = torch.from_numpy(round_weight("w", weight, "int4", group_size).dequantize())
    groups = weight.reshape(40, -1, group_size)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).clamp(min=1e-9)
    zero = (-low / step).round()
    plain = ((groups / step + zero).round().clamp(0, 15) - zero) * step
    errors = (rounded.reshape(groups.shape) - groups).square().sum(2)
    plain_errors = (plain - groups).square().sum(2)
    assert (errors <= plain_errors * 1.0001).all()
    assert errors.sum() < 0.97 * plain_errors.sum()
    assert not rounded[3].any()


def test_int4_keeps_what_it_can_represent() -> None:
    """Codes that use the whole range come back, with their scale."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (8, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    zeros, scales = rng.integers(1, 15, (8, 4, 1)), rng.uniform(0.1, 2, (8, 4, 1))
    weight = torch.from_numpy(((codes - zeros) * scales).reshape(8, 128)).float()
    rounded = round_weight("w", weight, "int4", 32)
    np.testing.assert_array_equal(rounded.values.reshape(codes.shape), codes)
    np.testing.assert_allclose(rounded.dequantize(), weight, rtol=1e-5, atol=1e-6)


def test_bytes_are_the_nearest_of_their_row() -> None:
    weight = some_weight()
    largest = weight.abs().amax(1, keepdim=True)
    int8 = torch.from_numpy(round_weight("w", weight.bfloat16(), "int8", None).dequantize())
    assert ((int8 - weight.bfloat16()).abs() <= largest / 127 * 0.51).all()
    fp8 = torch.from_numpy(round_weight("w", weight, "fp8", None).dequantize())
    # Three bits of mantissa, or steps of 2^-9 where e4m3 has no smaller exponent, by up to twice the scale.
    assert ((fp8 - weight).abs() <= torch.maximum(weight.abs() / 15.9, largest / 448 / 500)).all()
    scale = largest / 448
    plain = (weight / scale.clamp(min=1e-9)).to(torch.float8_e4m3fn).float() * scale
    errors, plain_errors = ((each - weight).square().sum(1) for each in (fp8, plain))
    assert (errors <= plain_errors * 1.0001).all()
    assert errors.sum() < 0.95 * plain_errors.sum()
    assert not int8[3].any()
    assert not fp8[3].any()


@pytest.mark.parametrize("wanted", ["int4", "fp8", "int8"])
def test_weights_that_are_no_numbers_are_refused_by_name(wanted: Any) -> None:
    weight = some_weight()
    weight[2, 5] = torch.nan
    with pytest.raises(ExportError, match=r"layer\.weight has infinities or NaN"):
        round_weight("layer.weight", weight, wanted, 32)


def test_parts_of_one_weight_are_made_once_and_not_kept() -> None:
    latest, made = LatestParts(), []

    def tensors_of(name: str) -> list[ir.LazyTensor]:
        def make() -> dict[str, ir.Tensor]:
            made.append(name)
            return {key: ir.tensor([1.0]) for key in "ab"}

        return [latest.tensor(name, key, Part(ir.DataType.FLOAT, (1,)), make) for key in "ab"]

    tensors = tensors_of("first") + tensors_of("second")
    for tensor in tensors:
        tensor.tobytes()
    assert made == ["first", "second"]
    tensors[0].tobytes()
    assert made == ["first", "second", "first"]


# --------------------------------------------------------------------------- graphs


def export(
    model: Path, folder: Path, quantization: Quantization, lowering: Lowering, dtype: DType = "float32"
) -> ExportedModel:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    exported = export_model(Checkpoint.open(str(model)), dtype, quantization=quantization, lowering=lowering)
    write_graph(exported, folder)
    onnx.checker.check_model(str(folder / "model.onnx"))
    return exported


def expected_logits(model: Path, exported: ExportedModel) -> np.ndarray:
    """Hugging Face's with the weights that the build rounded."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for choice in exported.weights:
            if choice.is_quantized:
                weight = hf.get_parameter(choice.name)
                kind: Any = choice.kind
                rounded = round_weight(choice.name, weight, kind, choice.group_size)
                weight.copy_(torch.from_numpy(rounded.dequantize()))
        return hf(torch.tensor([TEXT])).logits[0].numpy()


def logits_of(executor: Executor, drive: Drive) -> np.ndarray:
    driver = drive(executor, [7, 3, 20])
    return driver.run([{"a": TEXT[:40]}, {"a": TEXT[40:49]}, {"a": TEXT[49:]}])["a"]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# In bfloat16 OpenVINO also rounds activations to 8 bits before it multiplies them by integers.
@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    [
        (Quantization("int4", exclude=(EXCLUDED,)), "float32", 1e-4),
        (Quantization("int8"), "bfloat16", 0.05),
        (Quantization("fp8"), "float32", 1e-4),
    ],
)
def test_openvino_computes_with_rounded_weights(
    tiny_llama: Path,
    tmp_path: Path,
    make_manifest: MakeManifest,
    drive: Drive,
    quantization: Quantization,
    dtype: DType,
    tolerance: float,
) -> None:
    exported = export(tiny_llama, tmp_path, quantization, "native", dtype)
    manifest = make_manifest(exported.layers, dtype=dtype)
    logits = logits_of(OpenVINOExecutor(tmp_path, manifest, threads=2), drive)
    expected = expected_logits(tiny_llama, exported)
    assert relative_error(logits, expected) < tolerance
    if quantization.format == "int4":
        check_choices(exported)
        check_that_memory_has_four_bits(tmp_path, exported)


def check_choices(exported: ExportedModel) -> None:
    choices = {choice.name: choice for choice in exported.weights}
    assert len(choices) == 2 * 7 + 2
    assert choices["lm_head.weight"].reason == "the output embedding stays as it is by policy"
    assert choices["model.embed_tokens.weight"].reason == "used by Gather, which is no projection"
    assert choices["model.layers.1.self_attn.q_proj.weight"].reason == f"excluded by {EXCLUDED!r}"
    up, down = (choices[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert (up.kind, up.group_size) == ("int4", 64)
    assert (down.kind, down.group_size) == ("int4", 32)  # of 96 columns
    # Values, a float32 scale and half a byte of zero point for each of 3 groups in 64 rows.
    assert down.bytes_after == 64 * 96 // 2 + 64 * 3 * 4 + 64 * 3 // 2
    assert sum(choice.kind == "int4" for choice in choices.values()) == 10
    assert exported.weight_bytes < sum(choice.bytes_before for choice in choices.values())


def check_that_memory_has_four_bits(folder: Path, exported: ExportedModel) -> None:
    model = read_graph(folder / "model.onnx", exported.layers)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    types = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].value == "FullyConnected":
            weight = node.input_value(1).get_node()
            types.append(weight.get_rt_info()["outputPrecisions"].value)
    assert types.count("u4") == 10


@pytest.mark.parametrize("wanted", ["int4", "fp8"])
def test_own_operators_compute_with_rounded_weights(
    tiny_llama: Path, tmp_path: Path, make_manifest: MakeManifest, drive: Drive, wanted: Any
) -> None:
    exported = export(tiny_llama, tmp_path, Quantization(wanted), "plugin")
    operators = [node.op_type for node in exported.model.graph]
    assert operators.count({"int4": "Int4Gemm", "fp8": "Fp8Gemm"}[wanted]) == 14
    assert operators.count("Linear") == 1
    executor = ReferenceExecutor(tmp_path, make_manifest(exported.layers), device=torch.device("cpu"))
    assert relative_error(logits_of(executor, drive), expected_logits(tiny_llama, exported)) < 1e-4


def tiny_model(folder: Path, model_type: str, **sizes: int) -> Path:
    common = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, **common, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_what_no_group_divides_stays_and_if_nothing_is_left_the_build_ends(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", hidden_size=48, intermediate_size=64)
    exported = export(model, tmp_path / "graph", Quantization("int4"), "native")
    kinds = {choice.name.split(".")[-2]: choice.kind for choice in exported.weights}
    assert kinds["down_proj"] == "int4"
    assert kinds["up_proj"] == "float32"
    reasons = {choice.name.split(".")[-2]: choice.reason for choice in exported.weights}
    assert "48 input features are no multiple of 32" in reasons["up_proj"]
    with pytest.raises(ConfigError, match=r"--int4 .* input features \(48\) are a multiple of 32"):
        export(model, tmp_path / "none", Quantization("int4", exclude=("*down_proj*",)), "native")
    with pytest.raises(ConfigError, match=r"--int8 .* no weight of this model: --exclude leaves out all"):
        export(model, tmp_path / "none", Quantization("int8", exclude=("*_proj*",)), "native")
    with pytest.raises(ConfigError, match="--exclude 'nothing' matches no weight"):
        export(model, tmp_path / "none", Quantization("int8", exclude=("nothing",)), "native")
    assert not (tmp_path / "none").exists()


def test_patterns_that_match_nothing_are_mistakes() -> None:
    names = ["model.layers.0.mlp.up_proj.weight"]
    check_exclusions(names, ["*.up_proj.*"])
    with pytest.raises(ConfigError, match=r"--exclude 'model\.layer\.\*' matches no weight"):
        check_exclusions(names, ["*.up_proj.*", "model.layer.*"])


def test_runtimes_without_an_operator_for_a_format_are_refused() -> None:
    assert choose_lowering("openvino", "int8") == "native"
    assert choose_lowering("tensorrt", "int4") == "plugin"
    with pytest.raises(ConfigError, match="--int8 cannot be built for --runtime reference"):
        choose_lowering("reference", "int8")
    assert choose_lowering("tensorrt-rtx", "int8") == "signed"
    with pytest.raises(ConfigError, match="not built for --runtime fake yet"):
        choose_lowering("fake", None)


# --------------------------------------------------------------------------- calibration


def test_calibration_texts_are_the_same_each_time_or_a_file_s_lines(tmp_path: Path) -> None:
    texts = calibration_texts(None)
    assert texts == calibration_texts(None)
    assert sum(map(len, texts)) > 4 * 32 * 256  # tokens have some four characters
    file = tmp_path / "texts.txt"
    file.write_text("one\n\ntwo\n")
    assert calibration_texts(file) == ["one", "two"]
    with pytest.raises(ConfigError, match=r"--calibration-text .*missing\.txt cannot be read"):
        calibration_texts(tmp_path / "missing.txt")


def test_awq_finds_scales_once_and_weights_are_rounded_with_them(
    tiny_llama: Path, tiny_tokenizer: Path, tmp_path: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_tokenizer, model)
    # The tokenizer has more tokens than the model that other tests share.
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_llama, vocab_size=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    checkpoint = Checkpoint.open(str(model))
    texts = calibration_texts(None)
    cache = tmp_path / "trtforge" / "calibration"
    progress: list[tuple[int, int]] = []
    quantization = Quantization("int4", exclude=("model.layers.1.mlp.*",), calibration_sha256="any")

    def find_scales() -> Scales:
        found = calibrate(checkpoint, quantization, texts, cache, lambda *counts: progress.append(counts))
        assert not found.x_scales
        return found.input_scales

    with pytest.raises(ConfigError, match=r"the calibration text has [0-9]+ tokens: give at least 256"):
        calibrate(checkpoint, quantization, ["short"], cache, lambda *counts: None)
    scales = find_scales()
    assert progress[-1] == (64, 64)
    calls = len(progress)
    assert find_scales().keys() == scales.keys()
    assert len(progress) == calls
    assert len(scales) == 11
    assert any(scale.std() > 0.01 for scale in scales.values())
    # The whole build finds them too, and each weight has groups of its own size.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = build(
        BuildOptions(
            model=str(model),
            output=tmp_path / "repository",
            runtime="reference",
            int4=True,
            calibrate="awq",
            exclude=quantization.exclude,
            kv_cache_bytes=2**20,
        )
    )
    made = {choice.name: choice for choice in result.report.weights if choice.is_quantized}
    assert made.keys() == scales.keys()
    assert {choice.reason for choice in made.values()} == {"rounded to the nearest with AWQ's scales"}
    assert {choice.group_size for choice in made.values()} == {32, 64}
    version = result.folder / VERSION_FOLDER
    assert (version / result.manifest.tokenizer / "tokenizer.json").is_file()
    executor = ReferenceExecutor(version, result.manifest, device=torch.device("cpu"))
    logits = logits_of(executor, drive)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, choice in made.items():
            weight, scale = hf.get_parameter(name), torch.from_numpy(scales[name])
            rounded = round_weight(name, weight / scale, "int4", choice.group_size)
            weight.copy_(torch.from_numpy(rounded.dequantize()) * scale)
        expected = hf(torch.tensor([TEXT])).logits[0].numpy()
    assert relative_error(logits, expected) < 1e-4

"""Checkpoints that are quantized already: made here as their formats are published, imported, compared."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_layouts import (
    FORMATS,
    GROUP,
    Stored,
    bitsandbytes_nf4,
    change_config,
    compressed,
    fp8_block,
    fp8_channel,
    fp8_tensor,
    fp8_transformers,
    int8_channel,
    quantize,
)
from transformers import AutoModelForCausalLM

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import export_model, write_graph
from trtforge.errors import ExportError
from trtforge.manifest import Manifest
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

Drive = Callable[..., Any]
MakeManifest = Callable[..., Manifest]

TEXT = np.random.default_rng(0).integers(128, size=40).tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_format_says(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    settings, store, kind = FORMATS[name]
    weights = quantize(tiny_llama, tmp_path / "model", settings, store)
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    assert checkpoint.quantized.keys() == weights.keys()
    assert checkpoint.quant_method == settings["quant_method"]
    for key, linear in checkpoint.quantized.items():
        assert linear.format == kind
        assert linear.shape == tuple(weights[key].shape)
        assert linear.group_size == (GROUP if kind == "int4" else None)
        np.testing.assert_allclose(linear.dequantize(), weights[key], rtol=1e-6, atol=1e-7)
    kept = {key for key in checkpoint.tensors if key.endswith("_proj.weight") or "scale" in key}
    assert not kept


# What formats differ in for the graph: groups with zero points in their order and not, scales of inputs,
# of blocks, bytes that are expanded because there is no operator for them.
@pytest.mark.parametrize(
    ("name", "lowering", "tolerance"),
    [
        ("gptq-act-order", "native", 1e-4),
        ("gptq-act-order", "plugin", 1e-4),
        ("modelopt-awq", "native", 1e-4),
        ("deepseek-fp8", "native", 1e-4),
        ("compressed-int8", "plugin", 1e-4),
    ],
)
def test_runtimes_compute_with_the_numbers_of_the_checkpoint(
    tiny_llama: Path,
    tmp_path: Path,
    make_manifest: MakeManifest,
    drive: Drive,
    name: str,
    lowering: Any,
    tolerance: float,
) -> None:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    settings, store, kind = FORMATS[name]
    weights = quantize(tiny_llama, tmp_path / "model", settings, store)
    exported = export_model(Checkpoint.open(str(tmp_path / "model")), "float32", lowering=lowering)
    write_graph(exported, tmp_path)
    made = {choice.name: choice for choice in exported.weights}
    for key in weights:
        if (kind, lowering) == ("int8", "plugin"):
            assert made[key].reason == "dequantized: there is no operator for int8 weights"
        else:
            assert made[key].kind == kind
            assert made[key].reason.startswith(f"from the checkpoint ({settings['quant_method']})")
    manifest = make_manifest(exported.layers)
    if lowering == "native":
        executor = OpenVINOExecutor(tmp_path, manifest, threads=2)
    else:
        executor = ReferenceExecutor(tmp_path, manifest, device=torch.device("cpu"))
    logits = drive(executor).run([{"a": TEXT}])["a"]
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for key, weight in weights.items():
            hf.get_parameter(key).copy_(weight)
        expected = hf(torch.tensor([TEXT])).logits[0].numpy()
    assert np.linalg.norm(logits - expected) < tolerance * np.linalg.norm(expected)


def of_inputs(layout: str, **inputs: object) -> dict[str, Any]:
    settings = compressed(layout, num_bits=8)
    settings["config_groups"]["group_0"]["input_activations"] = inputs or None
    return settings


@pytest.mark.parametrize(
    ("settings", "store", "activations"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor, "static"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, fp8_channel, "dynamic"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, fp8_channel, None),
        (of_inputs("float-quantized", num_bits=8, dynamic=False), fp8_tensor, "static"),
        (of_inputs("float-quantized", num_bits=8, dynamic=True, strategy="token"), fp8_channel, "dynamic"),
        (of_inputs("float-quantized"), fp8_channel, None),
        (of_inputs("int-quantized", num_bits=8, dynamic=True, symmetric=True), int8_channel, "dynamic"),
        (of_inputs("int-quantized", num_bits=8, dynamic=True, symmetric=False), int8_channel, None),
        ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_transformers, "static"),
        (FORMATS["deepseek-fp8"][0] | {"activation_scheme": "dynamic"}, fp8_block, "dynamic"),
    ],
)
def test_activations_are_what_the_format_says(
    tiny_llama: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    store: Callable[[np.ndarray], Stored],
    activations: str | None,
) -> None:
    quantize(tiny_llama, tmp_path / "model", settings, store)
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    for linear in checkpoint.quantized.values():
        assert linear.activations == activations
        if activations == "static":
            assert linear.read_x_scale() == np.float32(0.5)
        else:
            assert linear.read_x_scale is None
    assert not [name for name in checkpoint.tensors if "scale" in name]


@pytest.mark.parametrize(("name", "activations"), [("modelopt-fp8", "static"), ("deepseek-fp8", "dynamic")])
def test_activations_are_rounded_as_the_checkpoint_says_if_asked_to(
    tiny_llama: Path,
    tmp_path: Path,
    make_manifest: MakeManifest,
    drive: Drive,
    name: str,
    activations: Any,
) -> None:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    settings, store, _ = FORMATS[name]
    weights = quantize(tiny_llama, tmp_path / "model", settings, store)
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    exported = export_model(checkpoint, "float32", lowering="plugin", activations=activations)
    write_graph(exported, tmp_path)
    executor = ReferenceExecutor(tmp_path, make_manifest(exported.layers), device=torch.device("cpu"))
    logits = drive(executor).run([{"a": TEXT}])["a"]

    def change(_: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = args
        # No projection has more inputs than a block.
        scale = x.abs().amax(-1, keepdim=True) / 448 if activations == "dynamic" else 0.5
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for key, weight in weights.items():
            hf.get_parameter(key).copy_(weight)
        unrounded = hf(torch.tensor([TEXT])).logits[0].numpy()
        for key in weights:
            hf.get_submodule(key.removesuffix(".weight")).register_forward_pre_hook(change)
        expected = hf(torch.tensor([TEXT])).logits[0].numpy()
    effect = np.linalg.norm(unrounded - expected)
    assert effect > 0.01 * np.linalg.norm(expected)
    assert np.linalg.norm(logits - expected) < effect / 5


@pytest.mark.parametrize("nested", [True, False])
def test_tables_of_four_bits_are_dequantized(tiny_llama: Path, tmp_path: Path, nested: bool) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = tmp_path / "model"
    weights = quantize(tiny_llama, model, settings, lambda weight: bitsandbytes_nf4(weight, nested))
    checkpoint = Checkpoint.open(str(model))
    assert checkpoint.quantized.keys() == weights.keys()
    assert not [name for name in checkpoint.tensors if "weight." in name]
    for key, weight in checkpoint.quantized.items():
        np.testing.assert_allclose(weight.dequantize(), weights[key], rtol=1e-5, atol=1e-7)
    if nested:
        logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
        exported = export_model(checkpoint, "bfloat16", lowering="native")
        made = {choice.name: choice for choice in exported.weights}
        assert made[next(iter(weights))].reason == "dequantized: nf4 of bitsandbytes is a table, not a scale"
        assert not any(choice.is_quantized for choice in exported.weights)


def test_bytes_in_a_layout_of_a_gpu_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    settings, store, _ = FORMATS["bitsandbytes-int8"]

    def store_tiles(weight: np.ndarray) -> Stored:
        stored = store(weight)
        return Stored({**stored.tensors, "weight_format": torch.tensor(2, dtype=torch.uint8)}, stored.meaning)

    quantize(tiny_llama, tmp_path / "model", settings, store_tiles)
    with pytest.raises(ExportError, match="with bytes in the layout 2"):
        Checkpoint.open(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        ("gptq", {"bits": 8}, r"\(gptq\) with 8 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "in the format 'marlin'"),
        ("awq", {"version": "gemv"}, "in the version 'gemv'"),
        ("compressed-fp8", {"format": "nvfp4-pack-quantized"}, "in the format 'nvfp4-pack-quantized'"),
        ("modelopt-fp8", {"quant_algo": "NVFP4"}, r"\(modelopt\) by NVFP4"),
        ("deepseek-fp8", {"weight_block_size": [64, 64]}, r"in blocks of \[64, 64\]"),
        ("deepseek-fp8", {"weight_block_size": None}, "has no weight_scale"),
        (
            "compressed-fp8",
            {"quant_method": "hqq"},
            r"quantized \(hqq\), which is not supported",
        ),
        ("gptq", {"quant_method": "awq"}, "down_proj: Int4Gemm: in_features is 12"),
    ],
)
def test_variants_that_are_not_known_are_refused_by_name(
    tiny_llama: Path, tmp_path: Path, base: str, changes: dict[str, Any], said: str
) -> None:
    settings, store, _ = FORMATS[base]
    quantize(tiny_llama, tmp_path / "model", settings | changes, store)
    with pytest.raises(ExportError, match=said):
        Checkpoint.open(str(tmp_path / "model"))


def test_bytes_with_zero_points_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    settings, store, _ = FORMATS["compressed-int8"]

    def store_asymmetric(weight: np.ndarray) -> Stored:
        stored = store(weight)
        zeros = torch.ones(len(weight), 1, dtype=torch.int8)
        return Stored({**stored.tensors, "weight_zero_point": zeros}, stored.meaning)

    quantize(tiny_llama, tmp_path / "model", settings, store_asymmetric)
    with pytest.raises(ExportError, match="with zero points of bytes"):
        Checkpoint.open(str(tmp_path / "model"))


def test_a_checkpoint_that_only_says_so_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    change_config(tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ExportError, match=r"says that it is quantized \(gptq\), but has no such weights"):
        Checkpoint.open(str(tmp_path / "model"))

"""Quantized weights in engines of TensorRT-RTX, which are built without a GPU; ONNX Runtime computes them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.engine import EngineTarget, Network, choose_target
from trtforge.builder.export import export_model, write_graph
from trtforge.builder.lower import lower
from trtforge.builder.profiles import make_profiles
from trtforge.builder.quantization.policy import Quantization
from trtforge.builder.quantization.rounding import round_weight
from trtforge.builder.rank_engine import build_rank_engine
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.errors import ConfigError, EngineBuildError
from trtforge.manifest import DType, Manifest, Rank

Drive = Callable[..., Any]
MakeManifest = Callable[..., Manifest]

TEXT = np.random.default_rng(0).integers(128, size=50).tolist()
FORMATS = {"int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}


def lowered_model(
    checkpoint: Path, folder: Path, make_manifest: MakeManifest, wanted: Any, dtype: DType
) -> tuple[ir.Model, Manifest]:
    """The lowered graph of a model with rounded weights, also as lowered.onnx in `folder`."""
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    exported = export_model(
        Checkpoint.open(str(checkpoint)), dtype, quantization=Quantization(wanted), lowering="signed"
    )
    assert sum(choice.kind == wanted for choice in exported.weights) == 14
    write_graph(exported, folder)
    manifest = make_manifest(exported.layers, dtype=dtype)
    model = lower(folder / "model.onnx", manifest.kv_cache.block_size)
    onnx.save(ir.to_proto(model), folder / "lowered.onnx")
    rank = Rank(onnx="lowered.onnx", kv_layers=exported.layers, logits_columns=exported.logits_columns)
    return model, manifest.model_copy(update={"ranks": (rank,)})


def check_engine(model: ir.Model, manifest: Manifest, folder: Path, target: EngineTarget) -> None:
    """It is built, and has the weights in their few bits."""
    network = Network(ir.to_proto(model).SerializeToString(), folder / "model.onnx", target.package)
    profiles = make_profiles(target.package, manifest.limits, manifest.kv_cache)
    assert network.build(target, profiles).nbytes > (folder / "model.safetensors").stat().st_size / 2


@pytest.mark.parametrize("wanted", FORMATS)
def test_rounded_weights_are_computed_with_and_built(
    tiny_llama: Path,
    tmp_path: Path,
    make_manifest: MakeManifest,
    drive: Drive,
    tensorrt_rtx: ModuleType,
    wanted: Any,
) -> None:
    model, manifest = lowered_model(tiny_llama, tmp_path, make_manifest, wanted, "float32")
    values = [value for value in model.graph.initializers.values() if value.dtype == FORMATS[wanted]]
    assert len(values) == 14
    assert all(isinstance(value.const_value, ir.ExternalTensor) for value in values)
    driver = drive(OnnxRuntimeModel(tmp_path, manifest), [7, 3, 20])
    logits = driver.run([{"a": TEXT[:40]}, {"a": TEXT[40:49]}, {"a": TEXT[49:]}])["a"]

    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for value in values:
            weight = hf.get_parameter(value.name)
            group_size = 64 if weight.shape[1] == 64 else 32  # of 96 columns
            rounded = round_weight(value.name, weight, wanted, group_size)
            weight.copy_(torch.from_numpy(rounded.dequantize()))
        expected = hf(torch.tensor([TEXT])).logits[0].numpy()
    assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected)

    option = "--fp8" if wanted == "fp8" else None
    check_engine(model, manifest, tmp_path, choose_target("tensorrt-rtx", fp8_option=option))
    if wanted == "fp8":  # a checkpoint that is quantized already brings them without the option
        with pytest.raises(EngineBuildError, match=r"8-bit floats, which sm_86 cannot .* --gpu sm_89"):
            build_rank_engine(
                tmp_path / "model.onnx",
                choose_target("tensorrt-rtx", ["sm_86", "sm_89"]),
                manifest.limits,
                manifest.kv_cache,
                None,
                lambda fraction, phase: None,
            )


def test_four_bits_are_built_in_bfloat16(
    tiny_llama: Path, tmp_path: Path, make_manifest: MakeManifest, tensorrt_rtx: ModuleType
) -> None:
    model, manifest = lowered_model(tiny_llama, tmp_path, make_manifest, "int4", "bfloat16")
    check_engine(model, manifest, tmp_path, choose_target("tensorrt-rtx"))


def test_gpus_without_8_bit_floats_are_refused(tensorrt_rtx: ModuleType) -> None:
    target = choose_target("tensorrt-rtx", fp8_option="--fp8")
    assert target.compute_capabilities[0] == "8.9"
    with pytest.raises(ConfigError, match=r"--fp8 is not possible for sm_80, sm_86: .* from sm_89 on"):
        choose_target("tensorrt-rtx", ["sm_80", "sm_120", "sm_86"], fp8_option="--fp8")

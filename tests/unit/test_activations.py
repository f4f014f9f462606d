"""Activations of 8 bits: which scales they get, and that runtimes round them so."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import openvino as ov
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trtforge.builder.build import build
from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.engine import Network, choose_target
from trtforge.builder.export import ExportedModel, export_model, export_ranks, write_graph
from trtforge.builder.lower import lower
from trtforge.builder.options import BuildOptions
from trtforge.builder.profiles import make_profiles
from trtforge.builder.quantization.calibration import calibrate
from trtforge.builder.quantization.calibration_texts import calibration_texts
from trtforge.builder.quantization.policy import Calibration, Lowering, Quantization
from trtforge.builder.quantization.rounding import round_weight
from trtforge.builder.quantization.weights import ActivationScheme
from trtforge.builder.sharding.split import Parallelism
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.manifest import DType, Manifest, Rank
from trtforge.runtime.executors import openvino_executor
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor
from trtforge.runtime.executors.openvino_graph import read_graph
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

Drive = Callable[..., Any]
MakeManifest = Callable[..., Manifest]
Linears = Mapping[str, torch.nn.Linear]

TEXT = np.random.default_rng(0).integers(128, size=50).tolist()
LARGEST = {"fp8": 448.0, "int8": 127.0}


@dataclass(frozen=True)
class Scheme:
    """How a test rounds."""

    wanted: Any
    activations: ActivationScheme

    def round(self, x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        if self.wanted == "fp8":
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (x / scale).round().clamp(-128, 127) * scale


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def projections(hf: Any) -> Linears:
    return {
        name: module
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


@contextmanager
def changed_inputs(
    linears: Linears, change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Each projection reads what `change(name, x)` returns, or x as it is for None."""
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: change(name, args[0]))
        for name, linear in linears.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def largest_inputs(model: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The largest magnitude of each input feature of each projection, [in]."""
    found: dict[str, torch.Tensor] = {}

    def record(name: str, x: torch.Tensor) -> None:
        largest = x.abs().reshape(-1, x.shape[-1]).amax(0)
        found[name] = torch.maximum(found.get(name, largest), largest)

    hf = load(model)
    with torch.no_grad(), changed_inputs(projections(hf), record):
        hf(tokens)
    return found


def calibration_of(model: Path, scheme: Scheme) -> Calibration:
    """Scales that cut a little of what the test's text does; for int8 with some for inputs."""
    if scheme.activations == "dynamic":
        return Calibration()
    rng = np.random.default_rng(1)
    input_scales, x_scales = {}, {}
    for name, largest in largest_inputs(model, torch.tensor([TEXT])).items():
        if scheme.wanted == "int8":
            input_scales[f"{name}.weight"] = rng.uniform(0.5, 2, len(largest)).astype(np.float32)
            largest = largest * torch.from_numpy(input_scales[f"{name}.weight"])
        x_scales[f"{name}.weight"] = np.asarray(0.9 * largest.amax() / LARGEST[scheme.wanted], np.float32)
    return Calibration(input_scales, x_scales)


def expected_logits(model: Path, scheme: Scheme | None, calibration: Calibration, wanted: Any) -> np.ndarray:
    """Hugging Face's with rounded weights and, with a scheme, activations."""
    hf = load(model)
    linears = projections(hf)

    def change(name: str, x: torch.Tensor) -> torch.Tensor:
        input_scale = calibration.input_scales.get(f"{name}.weight")
        x = x if input_scale is None else x * torch.from_numpy(input_scale)
        if scheme is None:
            return x
        if scheme.activations == "static":
            return scheme.round(x, float(calibration.x_scales[f"{name}.weight"]))
        return scheme.round(x, x.abs().amax(-1, keepdim=True) / LARGEST[scheme.wanted])

    with torch.no_grad():
        for name, linear in linears.items():
            input_scale = torch.from_numpy(
                calibration.input_scales.get(f"{name}.weight", np.ones(1, np.float32))
            )
            rounded = round_weight(name, linear.weight / input_scale, wanted, None)
            linear.weight.copy_(torch.from_numpy(rounded.dequantize()))
        with changed_inputs(linears, change):
            return hf(torch.tensor([TEXT])).logits[0].numpy()


def check_logits(logits: np.ndarray, model: Path, scheme: Scheme, calibration: Calibration) -> None:
    """They are those of the rounding. A number between two of the format may go to either, as sums differ in
    their last bits."""
    expected = expected_logits(model, scheme, calibration, scheme.wanted)
    unrounded = expected_logits(model, None, calibration, scheme.wanted)
    size = np.linalg.norm(expected)
    effect = np.linalg.norm(unrounded - expected) / size
    assert effect > 0.01
    assert np.linalg.norm(logits - expected) / size < effect / 5


def export(
    model: Path, folder: Path, scheme: Scheme, lowering: Lowering, dtype: DType, calibration: Calibration
) -> ExportedModel:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    exported = export_model(
        Checkpoint.open(str(model)),
        dtype,
        quantization=Quantization(scheme.wanted),
        lowering=lowering,
        activations=scheme.activations,
        calibration=calibration,
    )
    write_graph(exported, folder)
    onnx.checker.check_model(str(folder / "model.onnx"))
    said = f"activations are {scheme.wanted} too, with {scheme.activations} scales"
    assert sum(said in choice.reason for choice in exported.weights) == 14
    return exported


def run(drive: Drive, executor: Any) -> np.ndarray:
    return drive(executor, [7, 3, 20]).run([{"a": TEXT[:40]}, {"a": TEXT[40:49]}, {"a": TEXT[49:]}])["a"]


# --------------------------------------------------------------------------- runtimes


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_own_operator_rounds_activations(
    tiny_llama: Path, tmp_path: Path, make_manifest: MakeManifest, drive: Drive, activations: ActivationScheme
) -> None:
    scheme = Scheme("fp8", activations)
    calibration = calibration_of(tiny_llama, scheme)
    exported = export(tiny_llama, tmp_path, scheme, "plugin", "float32", calibration)
    executor = ReferenceExecutor(tmp_path, make_manifest(exported.layers), device=torch.device("cpu"))
    check_logits(run(drive, executor), tiny_llama, scheme, calibration)


def test_openvino_rounds_activations_and_multiplies_integers(
    tiny_llama: Path, tmp_path: Path, make_manifest: MakeManifest, drive: Drive
) -> None:
    scheme = Scheme("int8", "static")
    calibration = calibration_of(tiny_llama, scheme)
    exported = export(tiny_llama, tmp_path, scheme, "native", "float32", calibration)
    manifest = make_manifest(exported.layers)
    check_logits(run(drive, OpenVINOExecutor(tmp_path, manifest, threads=2)), tiny_llama, scheme, calibration)
    # Of seven bits no CPU lets products overflow, so that it can multiply them as integers.
    halve_bytes(tmp_path)
    expected = run(drive, OnnxRuntimeModel(tmp_path, manifest))
    model = read_graph(tmp_path / "model.onnx", exported.layers, multiply_integers=True)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    products = [
        [source.get_node().get_rt_info()["outputPrecisions"].value for source in node.input_values()[:2]]
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].value == "FullyConnected"
    ]
    assert sum(set(product) <= {"i8", "u8"} for product in products) == 14
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_executor, "multiplies_integers", lambda: True)
        logits = run(drive, OpenVINOExecutor(tmp_path, manifest, threads=2))
    assert np.linalg.norm(logits - expected) < 0.01 * np.linalg.norm(expected)


def halve_bytes(folder: Path) -> None:
    """Make the int8 weights of a graph half as large, where they lie."""
    for weight in ir.load(folder / "model.onnx").graph.initializers.values():
        tensor = weight.const_value
        if tensor.dtype == ir.DataType.INT8:
            data = np.memmap(tensor.path, np.int8, "r+", tensor.offset, (tensor.length,))
            data[:] = data // 2
            data.flush()


@pytest.mark.parametrize("wanted", ["fp8", "int8"])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_standard_operators_round_activations_and_are_built(
    tiny_llama: Path,
    tmp_path: Path,
    make_manifest: MakeManifest,
    drive: Drive,
    tensorrt_rtx: ModuleType,
    wanted: Any,
    activations: ActivationScheme,
) -> None:
    scheme = Scheme(wanted, activations)
    calibration = calibration_of(tiny_llama, scheme)
    exported = export(tiny_llama, tmp_path, scheme, "signed", "float32", calibration)
    manifest = make_manifest(exported.layers)
    model = lower(tmp_path / "model.onnx", manifest.kv_cache.block_size)
    onnx.save(ir.to_proto(model), tmp_path / "lowered.onnx")
    rank = Rank(onnx="lowered.onnx", kv_layers=exported.layers, logits_columns=exported.logits_columns)
    lowered = manifest.model_copy(update={"ranks": (rank,)})
    check_logits(run(drive, OnnxRuntimeModel(tmp_path, lowered)), tiny_llama, scheme, calibration)
    check_engine(model, tmp_path, manifest, scheme)


@pytest.mark.parametrize("scheme", [Scheme("fp8", "static"), Scheme("int8", "dynamic")])
def test_activations_are_rounded_in_bfloat16(
    tiny_llama: Path, tmp_path: Path, make_manifest: MakeManifest, tensorrt_rtx: ModuleType, scheme: Scheme
) -> None:
    calibration = calibration_of(tiny_llama, scheme)
    exported = export(tiny_llama, tmp_path, scheme, "signed", "bfloat16", calibration)
    manifest = make_manifest(exported.layers, dtype="bfloat16")
    check_engine(lower(tmp_path / "model.onnx", manifest.kv_cache.block_size), tmp_path, manifest, scheme)


def check_engine(model: ir.Model, folder: Path, manifest: Manifest, scheme: Scheme) -> None:
    """TensorRT-RTX builds it; what reads the same numbers shares what rounds them."""
    operators = [node.op_type for node in model.graph]
    # q, k and v, and gate and up, unless their inputs have scales of their own.
    has_input_scales = scheme == Scheme("int8", "static")
    assert operators.count("QuantizeLinear") == (14 if has_input_scales else 8)
    fp8_option = "--fp8" if scheme.wanted == "fp8" else None
    target = choose_target("tensorrt-rtx", fp8_option=fp8_option)
    network = Network(ir.to_proto(model).SerializeToString(), folder / "model.onnx", target.package)
    assert network.build(target, make_profiles(target.package, manifest.limits, manifest.kv_cache)).nbytes


def test_ranks_share_the_scale_of_what_each_has_a_part_of(tiny_llama: Path) -> None:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    scheme = Scheme("int8", "static")
    calibration = calibration_of(tiny_llama, scheme)
    exported = export_ranks(
        Checkpoint.open(str(tiny_llama)),
        "float32",
        Parallelism(tp=2),
        quantization=Quantization("int8"),
        lowering="native",
        activations="static",
        calibration=calibration,
    )
    name = "model.layers.0.self_attn.o_proj.weight"
    parts = [rank.model.graph.initializers for rank in exported.ranks]
    for part in parts:
        assert part[f"{name}_x_scale"].const_value.numpy() == calibration.x_scales[name]
    scales = [part[f"{name}_input_scale"].const_value.numpy() for part in parts]
    np.testing.assert_array_equal(np.concatenate(scales), calibration.input_scales[name])


# --------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("wanted", ["fp8", "int8"])
def test_scales_are_those_of_what_the_model_reads(
    tiny_llama: Path,
    tiny_tokenizer: Path,
    tmp_path: Path,
    drive: Drive,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Any,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_tokenizer, model)
    torch.manual_seed(0)
    # The tokenizer has more tokens than the model that other tests share.
    config = AutoConfig.from_pretrained(tiny_llama, vocab_size=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    excluded = "model.layers.1.mlp.*"
    quantization = Quantization(wanted, exclude=(excluded,), calibration_sha256="any")
    progress: list[tuple[int, int]] = []
    found = calibrate(
        Checkpoint.open(str(model)),
        quantization,
        calibration_texts(None),
        tmp_path / "trtforge" / "calibration",
        lambda *counts: progress.append(counts),
    )
    assert progress[-1] == (32, 32)

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = (f"{text}\n\n" for text in calibration_texts(None))
    tokens = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    sequences = torch.tensor(tokens[: 32 * 256]).reshape(32, 256)
    sequences = torch.nn.functional.pad(sequences, (1, 0))  # <|endoftext|>, with which all prompts begin
    largest = {
        f"{name}.weight": values
        for name, values in largest_inputs(model, sequences).items()
        if "layers.1.mlp" not in name
    }
    assert found.x_scales.keys() == largest.keys()
    for name, of_features in largest.items():
        if wanted == "int8":  # the paper's formula with alpha 1: all of it goes to the weights
            smoothing = 1 / of_features
            np.testing.assert_allclose(found.input_scales[name], smoothing, rtol=1e-4)
            of_features = of_features * smoothing
        expected = of_features.amax() / LARGEST[wanted]
        np.testing.assert_allclose(found.x_scales[name], expected, rtol=1e-4)
    assert bool(found.input_scales) == (wanted == "int8")

    # The whole build finds them too.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = BuildOptions(
        model=str(model),
        output=tmp_path / "repository",
        runtime="openvino" if wanted == "int8" else "reference",
        exclude=(excluded,),
        activations="static",
        kv_cache_bytes=2**20,
        **{wanted: True},
    )
    result = build(options)
    made = [choice for choice in result.report.weights if choice.is_quantized]
    assert {choice.name for choice in made} == found.x_scales.keys()
    assert all("static scales" in choice.reason for choice in made)

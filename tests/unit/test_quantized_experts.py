"""Quantized experts: their numbers and place in the graph, parts of ranks, and what is computed with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.engine import Network, choose_target
from trtforge.builder.export import ExportedModel, TracedModel, divide, trace_checkpoint, write_graph
from trtforge.builder.lower import lower
from trtforge.builder.profiles import make_profiles
from trtforge.builder.quantization.experts import ExpertWeight, QuantizedExperts
from trtforge.builder.quantization.policy import Quantization
from trtforge.builder.quantization.rounding import round_weight
from trtforge.builder.quantization.slices import take_experts
from trtforge.builder.sharding.split import Parallelism
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.errors import ConfigError
from trtforge.manifest import DType, Manifest, Rank
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

Drive = Callable[..., Any]
MakeManifest = Callable[..., Manifest]
TraceModel = Callable[..., tuple[Path, TracedModel]]

TEXT = np.random.default_rng(0).integers(128, size=50).tolist()
SCHEDULE = [{"a": TEXT[:40]}, {"a": TEXT[40:49]}, {"a": TEXT[49:]}]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
}
# Experts that are stored one by one, renamed, and as one tensor with [in, out] and biases.
MODELS: dict[str, dict[str, int]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 96},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
}
LAYER = "model.layers.1.mlp"
UP, DOWN = f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.down_proj"
FORMATS = {"int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}
IN_AXIS = {"qwen3_moe": 2, "mixtral": 2, "gpt_oss": 1}


@pytest.fixture(scope="module")
def trace_model(tmp_path_factory: pytest.TempPathFactory) -> TraceModel:
    """`trace_model(model_type, dtype)`: a random model's folder, and what was traced of it; made once."""
    made: dict[tuple[str, DType], tuple[Path, TracedModel]] = {}

    def make(model_type: str, dtype: DType = "float32") -> tuple[Path, TracedModel]:
        if (model_type, dtype) not in made:
            folder = tmp_path_factory.mktemp(model_type)
            save_model(folder, model_type)
            logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
            traced = trace_checkpoint(Checkpoint.open(str(folder)), dtype, lambda _: None)
            made[model_type, dtype] = folder, traced
        return made[model_type, dtype]

    return make


def save_model(folder: Path, model_type: str, **sizes: int) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | MODELS[model_type] | sizes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # far from uniform attention and logits
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def expected_logits(model: Path, exported: ExportedModel) -> np.ndarray:
    """Hugging Face's with the weights that the build rounded."""
    hf = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    in_axis = IN_AXIS[hf.config.model_type]
    with torch.no_grad():
        for choice in exported.weights:
            if choice.is_quantized:
                weight: torch.Tensor = hf.get_parameter(choice.name)
                experts: Sequence[torch.Tensor] = [weight]
                if weight.ndim == 3:
                    experts = [each.T if in_axis == 1 else each for each in weight]
                for expert in experts:
                    kind: Any = choice.kind
                    rounded = round_weight(choice.name, expert, kind, choice.group_size)
                    expert.copy_(torch.from_numpy(rounded.dequantize()))
        return hf(torch.tensor([TEXT])).logits[0].numpy()


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# --------------------------------------------------------------------------- runtimes


@pytest.mark.parametrize("wanted", ["int4", "fp8"])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_reference_runtime_computes_with_rounded_experts(
    trace_model: TraceModel,
    tmp_path: Path,
    make_manifest: MakeManifest,
    drive: Drive,
    model_type: str,
    wanted: Any,
) -> None:
    model, traced = trace_model(model_type)
    (exported,) = divide(traced, Parallelism(), Quantization(wanted), "plugin").ranks
    write_graph(exported, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    assert [choice.kind for choice in exported.weights if choice.name in (UP, DOWN)] == [wanted] * 2
    executor = ReferenceExecutor(tmp_path, make_manifest(exported.layers), device=torch.device("cpu"))
    logits = drive(executor, [7, 3, 20]).run(SCHEDULE)["a"]
    assert relative_error(logits, expected_logits(model, exported)) < 1e-4


@pytest.mark.parametrize("wanted", ["int4", "fp8", "int8"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_engines_have_experts_in_few_bits(
    trace_model: TraceModel,
    tmp_path: Path,
    make_manifest: MakeManifest,
    drive: Drive,
    tensorrt_rtx: ModuleType,
    model_type: str,
    wanted: Any,
) -> None:
    """Of what ONNX Runtime computes with; it would round the inputs of projections of 8 bits."""
    model, traced = trace_model(model_type)
    quantization = Quantization(wanted, exclude=("*.self_attn.*",))
    (exported,) = divide(traced, Parallelism(), quantization, "signed").ranks
    write_graph(exported, tmp_path)
    manifest = make_manifest(exported.layers)
    lowered = lower(tmp_path / "model.onnx", manifest.kv_cache.block_size)
    onnx.save(ir.to_proto(lowered), tmp_path / "lowered.onnx")
    for name in (UP, DOWN):
        stored = lowered.graph.initializers[name]
        assert stored.dtype == FORMATS[wanted]
        assert isinstance(stored.const_value, ir.ExternalTensor)
    rank = Rank(onnx="lowered.onnx", kv_layers=exported.layers, logits_columns=exported.logits_columns)
    executor = OnnxRuntimeModel(tmp_path, manifest.model_copy(update={"ranks": (rank,)}))
    logits = drive(executor, [7, 3, 20]).run(SCHEDULE)["a"]
    assert relative_error(logits, expected_logits(model, exported)) < 1e-4

    target = choose_target("tensorrt-rtx", ["sm_89"])
    network = Network(ir.to_proto(lowered).SerializeToString(), tmp_path / "model.onnx", target.package)
    network.build(target, make_profiles(target.package, manifest.limits, manifest.kv_cache))


def test_engines_of_a_real_layer_are_not_expanded(
    tmp_path: Path, make_manifest: MakeManifest, tensorrt_rtx: ModuleType
) -> None:
    """Large enough that experts are most of the engine, which has them in four bits."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 1}
    save_model(tmp_path / "model", "qwen3_moe", **sizes)
    traced = trace_checkpoint(Checkpoint.open(str(tmp_path / "model")), "bfloat16", lambda _: None)
    (exported,) = divide(traced, Parallelism(), Quantization("int4"), "signed").ranks
    write_graph(exported, tmp_path)
    manifest = make_manifest(exported.layers, dtype="bfloat16")
    lowered = lower(tmp_path / "model.onnx", manifest.kv_cache.block_size)
    target = choose_target("tensorrt-rtx", ["sm_89"])
    network = Network(ir.to_proto(lowered).SerializeToString(), tmp_path / "model.onnx", target.package)
    engine = network.build(target, make_profiles(target.package, manifest.limits, manifest.kv_cache))
    num_weights = 16 * 3 * 512 * 512
    assert num_weights / 2 < engine.nbytes < num_weights


# --------------------------------------------------------------------------- choices


def test_what_becomes_of_experts_is_said(trace_model: TraceModel) -> None:
    _, traced = trace_model("gpt_oss")
    quantization = Quantization("int4", exclude=("model.layers.0.*.gate_up_proj",))
    (exported,) = divide(traced, Parallelism(), quantization, "plugin").ranks
    choices = {choice.name: choice for choice in exported.weights}
    excluded = choices["model.layers.0.mlp.experts.gate_up_proj"]
    assert excluded.reason == "excluded by 'model.layers.0.*.gate_up_proj'"
    assert (excluded.kind, excluded.bytes_after) == ("float32", excluded.bytes_before)
    assert choices["model.layers.0.mlp.experts.down_proj"].kind == "int4"
    assert choices[f"{LAYER}.router.weight"].reason == "routers are not quantized by policy"
    assert choices[f"{UP}_bias"].reason == "biases of experts are not quantized by policy"
    assert choices[UP].label == "int4, groups of 64"
    assert choices[UP].shape == (4, 64, 192)
    assert choices[DOWN].label == "int4, groups of 32"  # of 96 input features
    assert choices[DOWN].reason == "rounded to the nearest"
    # Half a byte a number; a scale and an offset of float32 for each of 3 groups of 64 columns.
    assert choices[DOWN].bytes_after == 4 * (96 * 64 // 2 + 3 * 64 * 2 * 4)
    nodes = [node for node in exported.model.graph if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 3


def test_experts_alone_can_be_quantized(trace_model: TraceModel) -> None:
    _, traced = trace_model("qwen3_moe")
    quantization = Quantization("fp8", exclude=("*.self_attn.*",))
    (exported,) = divide(traced, Parallelism(), quantization, "plugin").ranks
    assert {choice.name for choice in exported.weights if choice.is_quantized} == {
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in range(2)
        for part in ("gate_up_proj", "down_proj")
    }


def test_experts_that_no_group_divides_stay(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3_moe", moe_intermediate_size=40)
    checkpoint = Checkpoint.open(str(tmp_path))
    nothing = Quantization("int4", exclude=("*.self_attn.*", "*.gate_up_proj"))
    with pytest.raises(ConfigError, match=r"input features \(40\) are a multiple of 32"):
        trace_checkpoint(checkpoint, "float32", lambda _: None, nothing)
    traced = trace_checkpoint(checkpoint, "float32", lambda _: None, Quantization("int4"))
    (exported,) = divide(traced, Parallelism(), Quantization("int4"), "plugin").ranks
    choices = {choice.name: choice for choice in exported.weights}
    assert choices[DOWN].reason == "40 input features are no multiple of 32, the smallest group"
    assert choices[UP].kind == "int4"


# --------------------------------------------------------------------------- ranks


def meaning(exported: ExportedModel, name: str, in_axis: int) -> np.ndarray:
    """What the graph's tensors of experts stand for, as DequantizeLinear and offsets of ONNX have it."""
    initializers = exported.model.graph.initializers
    values, scale = (initializers[name + part].const_value.numpy() for part in ("", "_scale"))
    block_size = values.shape[in_axis] // scale.shape[in_axis]
    wide = values.astype(np.float32) * np.repeat(scale, block_size, in_axis)
    if f"{name}_offset" not in initializers:
        return wide
    offset = initializers[f"{name}_offset"].const_value.numpy()  # [experts, groups, out]
    by_element = np.repeat(offset, block_size, 1)
    return wide - (by_element if in_axis == 1 else by_element.swapaxes(1, 2))


@pytest.mark.parametrize("wanted", ["int4", "fp8", "int8"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_ranks_have_the_numbers_of_one(trace_model: TraceModel, model_type: str, wanted: Any) -> None:
    _, traced = trace_model(model_type)
    in_axis = IN_AXIS[model_type]
    (whole,) = divide(traced, Parallelism(), Quantization(wanted, 32), "signed").ranks
    ranks = divide(traced, Parallelism(tp=2), Quantization(wanted, 32), "signed").ranks
    down = [meaning(rank, DOWN, in_axis) for rank in ranks]
    np.testing.assert_array_equal(np.concatenate(down, in_axis), meaning(whole, DOWN, in_axis))
    assert [part.shape[in_axis] for part in down] == ([64, 32] if wanted == "int4" else [48, 48])
    up = [meaning(rank, UP, in_axis) for rank in ranks]
    if model_type == "qwen3_moe":  # a rank has a part of gate, then one of up
        halves = [np.split(part, 2, axis=1) for part in up]
        joined = np.concatenate([part for half in zip(*halves, strict=True) for part in half], axis=1)
    else:
        joined = np.concatenate(up, axis=2)
    np.testing.assert_array_equal(joined, meaning(whole, UP, in_axis))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_logits_of_ranks_are_those_of_one(
    trace_model: TraceModel,
    tmp_path: Path,
    drive: Drive,
    make_threaded_ranks: Callable[..., Any],
    model_type: str,
) -> None:
    _, traced = trace_model(model_type)
    logits = {}
    for tp in (1, 2):
        ranks = divide(traced, Parallelism(tp), Quantization("int4", 32), "plugin").ranks
        logits[tp] = drive(make_threaded_ranks(ranks, tp, tmp_path / str(tp), 16, 8)).run(SCHEDULE)["a"]
    np.testing.assert_allclose(logits[2], logits[1], rtol=0, atol=1e-5 * np.abs(logits[1]).max())


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_stored_experts_are_the_same_numbers(transposed: bool) -> None:
    rng = np.random.default_rng(0)
    scale, zero = rng.uniform(0.5, 2, (2, 8, 3)).astype(np.float32), rng.integers(16, size=(2, 8, 3))
    stored = [
        ExpertWeight(rng.integers(16, size=(8, 96)).astype(np.uint8), scale[number], zero[number])
        for number in range(2)
    ]
    shape = (2, 96, 8) if transposed else (2, 8, 96)
    whole = QuantizedExperts("int4", shape, transposed, 32, "random", stored.__getitem__)
    for axis, ranges in (
        (whole.in_axis, ((32, 96),)),
        (whole.in_axis, ((0, 32), (64, 96))),
        (3 - whole.in_axis, ((1, 4), (5, 7))),
    ):
        part = take_experts("w", whole, axis, ranges)
        indices = [index for pair in ranges for index in range(*pair)]
        expected = np.take(whole.dequantize(), indices, axis)
        assert part.shape == expected.shape
        np.testing.assert_array_equal(part.dequantize(), expected)
    with pytest.raises(
        ConfigError, match="--tp would cut w at input feature 48, within 32 that share a scale"
    ):
        take_experts("w", whole, whole.in_axis, ((0, 48),))


def test_groups_that_a_rank_would_have_a_part_of_are_refused(trace_model: TraceModel) -> None:
    _, traced = trace_model("gpt_oss")
    exclude = ("*.self_attn.*",)
    with pytest.raises(ConfigError, match=rf"--tp 4 cannot divide .*{DOWN}.*96 .* multiples of 32"):
        divide(traced, Parallelism(4), Quantization("int4", exclude=exclude), "plugin")
    divide(traced, Parallelism(4), Quantization("fp8", exclude=exclude), "plugin")
    divide(traced, Parallelism(4), Quantization("int4", exclude=(*exclude, "*.down_proj")), "plugin")

"""A KV cache of e4m3 on the reference executor; Hugging Face rounds keys and values alike."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from trtforge import wire
from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import ExportedModel, export_model, write_graph
from trtforge.builder.inspection.graph_facts import GraphFacts, read_model
from trtforge.builder.quantization.cache_scales import attach_cache_scales
from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError, ExportError
from trtforge.manifest import DType, Limits, Manifest
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.executors.reference_executor import ReferenceExecutor
from trtforge.runtime.outputs import EngineStats
from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduling.block_moves import BlockMoves

Drive = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]
MakeManifest = Callable[..., Manifest]
Scales = dict[tuple[int, str], float]  # by layer, "k" or "v"

CPU = torch.device("cpu")
TEXT = np.random.default_rng(0).integers(128, size=100).tolist()
STEPS = [{"a": TEXT[:40]}, {"a": TEXT[40:90]}, *({"a": [token]} for token in TEXT[90:])]


@pytest.fixture(autouse=True)
def quiet_exporter() -> None:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)


def export(checkpoint: Path, folder: Path, dtype: DType, **values: Any) -> ExportedModel:
    exported = export_model(Checkpoint.open(str(checkpoint)), dtype, cache_dtype="float8_e4m3fn", **values)
    write_graph(exported, folder)
    return exported


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, make_manifest: MakeManifest
) -> tuple[Path, Manifest]:
    """The tiny llama in float32 with a cache of e4m3: its folder and manifest."""
    folder = tmp_path_factory.mktemp("e4m3")
    exported = export(tiny_llama, folder, "float32")
    return folder, make_manifest(exported.layers, kv_cache_dtype="float8_e4m3fn")


@pytest.fixture(scope="module")
def model_in_16_bits(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, make_manifest: MakeManifest
) -> tuple[Path, Manifest]:
    """The same in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16")
    exported = export(tiny_llama, folder, "bfloat16")
    return folder, make_manifest(exported.layers, dtype="bfloat16", kv_cache_dtype="float8_e4m3fn")


def hugging_face_logits(hf: Any, scales: Scales | None = None) -> np.ndarray:
    """Of TEXT, with keys and values as a cache with `scales` gives them back; None: as they are."""

    def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def attention(module: Any, q: Any, k: Any, v: Any, *others: Any, **named: Any) -> Any:
        if scales is not None:
            k = rounded(k, scales.get((module.layer_idx, "k"), 1.0))
            v = rounded(v, scales.get((module.layer_idx, "v"), 1.0))
        return eager_attention_forward(module, q, k, v, *others, **named)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "rounded", attention)
        patch.setattr(hf.config, "_attn_implementation", "rounded")
        return hf(torch.tensor([TEXT]), attention_mask=_causal_mask()).logits[0].float().numpy()


def _causal_mask() -> torch.Tensor:
    size = (1, 1, len(TEXT), len(TEXT))
    return torch.full(size, torch.finfo(torch.float32).min).triu(1)


def distance(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


# --------------------------------------------------------------------------- a whole model


def test_keys_and_values_are_rounded_and_nothing_else(
    model: tuple[Path, Manifest], tiny_llama: Path, drive: Drive
) -> None:
    folder, manifest = model
    logits = drive(ReferenceExecutor(folder, manifest, device=CPU), [7, 3, 20, 5]).run(STEPS)["a"]
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    # Where sums in another order round a key to its other neighbour, a little is left.
    assert distance(logits, hugging_face_logits(hf, {})) < 2e-3
    exact = hugging_face_logits(hf)
    assert 0.01 < distance(logits, exact) < 0.15


def test_sixteen_bits_around_the_cache(
    model_in_16_bits: tuple[Path, Manifest], tiny_llama: Path, drive: Drive
) -> None:
    folder, manifest = model_in_16_bits
    logits = drive(ReferenceExecutor(folder, manifest, device=CPU)).run(STEPS)["a"]
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    assert distance(logits, hugging_face_logits(hf, {})) < 0.15


def test_check_tells_rounding_of_the_cache_from_errors(
    model_in_16_bits: tuple[Path, Manifest], run_trtforge: Run
) -> None:
    """Runtimes that compute in 16 bits round many keys to different neighbours."""
    folder, manifest = model_in_16_bits
    manifest.model_copy(update={"runtime": "reference"}).save(folder)
    status, output, _ = run_trtforge("check", folder)
    assert (status, output.count("pass"), output.count("FAIL")) == (0, 3, 0)
    assert "Not run by openvino: OpenVINO has no KV cache of float8_e4m3fn" in output


def test_the_graph_says_what_the_manifest_says(model: tuple[Path, Manifest]) -> None:
    folder, manifest = model
    facts = GraphFacts.of(read_model(folder / "model.onnx"), folder / "model.onnx")
    caches = {
        tensor.name: tensor.dtype for tensor in (*facts.inputs, *facts.outputs) if "cache" in tensor.name
    }
    names = [kind(layer) for layer in range(2) for kind in (wire.kv_cache_input, wire.kv_cache_output)]
    assert caches == dict.fromkeys(names, manifest.kv_cache.dtype)


def test_a_cache_of_integers_is_refused(model: tuple[Path, Manifest]) -> None:
    """Its graph has none: OpenVINO's scales are its own."""
    folder, manifest = model
    layout = manifest.kv_cache.model_copy(update={"dtype": "int8"})
    with pytest.raises(ConfigError, match="has a KV cache of int8, which only OpenVINO has scales for"):
        ReferenceExecutor(folder, manifest.model_copy(update={"kv_cache": layout}), device=CPU)


def test_moved_blocks_keep_their_contents(model: tuple[Path, Manifest], drive: Drive) -> None:
    """Swapped out and in, and copied: to the bit, since the steps are the same."""
    folder, manifest = model
    expected = drive(ReferenceExecutor(folder, manifest, device=CPU), [3, 4, 5]).run(STEPS[:3])["a"]
    executor = ReferenceExecutor(folder, manifest, device=CPU, num_host_blocks=4)
    original = drive(executor, [3, 4, 5])
    rows = [original.step(step)["a"] for step in STEPS[:2]]
    executor.move_blocks(BlockMoves(swap_out=[(4, 2), (5, 0)], copies=[(3, 9)]))
    drive(executor, [3, 4, 5]).step({"b": TEXT[:96]})
    executor.move_blocks(BlockMoves(swap_in=[(2, 11), (0, 10)]))
    moved = original.inputs(STEPS[2])
    renumbered = np.array([[9, 11, 10]], np.int32)
    slots = renumbered[0, moved.position_ids // 32] * 32 + moved.position_ids % 32
    moved = dataclasses.replace(moved, block_tables=renumbered, slot_mapping=slots.astype(np.int32))
    rows.append(executor.execute(moved).logits)
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def run_core(
    folder: Path, manifest: Manifest, options: EngineOptions
) -> tuple[dict[Any, list[int]], EngineStats]:
    """The tokens of two answers to each of some requests with a common prefix, and what that took."""
    limits = Limits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64)
    executor = create_executor(manifest.model_copy(update={"runtime": "reference"}), folder, options)
    core = EngineCore(executor, limits, (), manifest.model.vocab_size, options)
    for number in range(4):
        prompt = (*TEXT[:70], *TEXT[70 + number : 76 + 2 * number])
        sampling = SamplingParams(max_tokens=30, n=2, temperature=0.7, seed=number)
        core.add_request(EngineRequest(str(number), prompt, sampling))
    tokens: dict[Any, list[int]] = {}
    while core.has_work():
        for output in core.step():
            assert output.error is None
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    stats = core.stats
    core.close()
    return tokens, stats


def test_swapped_and_shared_blocks_change_nothing(model: tuple[Path, Manifest]) -> None:
    folder, manifest = model
    block_bytes = manifest.kv_cache.block_size * 2 * 2 * 2 * 16
    few = EngineOptions(kv_cache_bytes=9 * block_bytes, swap_bytes=20 * block_bytes, preemption_mode="swap")
    tokens, stats = run_core(folder, manifest, few)
    assert stats.num_blocks == 9
    assert min(stats.num_preemptions, stats.num_swapped_blocks, stats.num_prefix_hits) > 0
    alone, stats = run_core(folder, manifest, EngineOptions(prefix_caching=False))
    assert (stats.num_preemptions, stats.num_prefix_hits) == (0, 0)
    assert tokens == alone
    assert all(len(answer) == 30 for answer in tokens.values())


# --------------------------------------------------------------------------- scales of checkpoints

SCALES: Scales = {(0, "k"): 0.3, (0, "v"): 0.007, (1, "v"): 0.002}  # the last one saturates
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"},
}


def save_with_scales(
    model: Path, folder: Path, settings: dict[str, Any], name: str, scales: dict[Any, Any]
) -> dict[str, torch.Tensor]:
    """Make `folder` the model with projections of e4m3 and scales of its cache; returns the projections."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale"] = torch.ones(1)
        weights[key] = tensors[key].float()
    for (layer, kind), scale in scales.items():
        tensors[f"model.layers.{layer}.self_attn.{name.format(kind)}"] = torch.tensor(scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return weights


@pytest.fixture
def graph(model: tuple[Path, Manifest]) -> ir.Graph:
    return ir.load(model[0] / "model.onnx").graph


def scales_of(graph: ir.Graph) -> Scales:
    """Of its attention nodes, in order."""
    names = [tensor.name for tensor in PAGED_ATTENTION.inputs]
    return {
        (layer, name[0]): float(value.const_value.numpy().item())
        for layer, node in enumerate(node for node in graph if node.op_type == PAGED_ATTENTION.name)
        for name, value in zip(names, node.inputs, strict=False)
        if name in ("k_scale", "v_scale") and value is not None
    }


def test_scales_of_a_checkpoint_are_those_of_its_cache(
    tiny_llama: Path, tmp_path: Path, make_manifest: MakeManifest, drive: Drive
) -> None:
    weights = save_with_scales(tiny_llama, tmp_path / "model", MODELOPT, "{0}_proj.{0}_scale", SCALES)
    exported = export(tmp_path / "model", tmp_path, "float32", lowering="plugin")
    manifest = make_manifest(exported.layers, kv_cache_dtype="float8_e4m3fn")
    logits = drive(ReferenceExecutor(tmp_path, manifest, device=CPU)).run(STEPS)["a"]
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for key, weight in weights.items():
            hf.get_parameter(key).copy_(weight)
    assert distance(logits, hugging_face_logits(hf, SCALES)) < 2e-3
    assert distance(logits, hugging_face_logits(hf, {})) > 0.02


@pytest.mark.parametrize(
    ("settings", "name"),
    [(MODELOPT, "{0}_proj.{0}_scale"), (COMPRESSED, "{0}_scale"), (COMPRESSED, "{0}_proj.output_scale")],
)
def test_names_of_scales(
    tiny_llama: Path, tmp_path: Path, graph: ir.Graph, settings: dict[str, Any], name: str
) -> None:
    """One of 1 is not needed, and one of a layer that is not built neither."""
    save_with_scales(tiny_llama, tmp_path / "model", settings, name, SCALES | {(1, "k"): 1.0, (2, "k"): 3.0})
    attach_cache_scales(graph, Checkpoint.open(str(tmp_path / "model")).cache_scales)
    assert scales_of(graph) == pytest.approx(SCALES)


@pytest.mark.parametrize(
    "change", [{"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, {"kv_cache_quant_algo": "INT8"}]
)
def test_scales_of_another_kind_of_cache_are_left_out(
    tiny_llama: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    save_with_scales(tiny_llama, tmp_path / "model", COMPRESSED | change, "{0}_scale", SCALES)
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    assert not checkpoint.cache_scales
    assert not any("k_scale" in name for name in checkpoint.tensors)


@pytest.mark.parametrize("scale", [[0.5, 0.25], 0.0, np.nan])
def test_scales_that_no_cache_has_are_refused(
    tiny_llama: Path, tmp_path: Path, graph: ir.Graph, scale: Any
) -> None:
    save_with_scales(tiny_llama, tmp_path / "model", COMPRESSED, "{0}_scale", {(1, "v"): scale})
    scales = Checkpoint.open(str(tmp_path / "model")).cache_scales
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.v_scale is .* one positive scale a layer"):
        attach_cache_scales(graph, scales)

"""The OpenVINO executor against Hugging Face and naive attention, and what it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from openvino.op import _PagedAttentionExtension
from transformers import AutoModelForCausalLM

from trtforge import wire
from trtforge.errors import CapacityError, ConfigError, EngineBuildError, ServerError, TrtforgeError
from trtforge.manifest import DType, LayerCache, Manifest
from trtforge.runtime.executor import Float32Array
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor, has_bfloat16
from trtforge.runtime.executors.openvino_graph import PAGED_ATTENTION_INPUTS, read_graph
from trtforge.runtime.executors.openvino_passes import merge_projections
from trtforge.runtime.scheduling.block_moves import BlockMoves

Drive = Callable[..., Any]
Export = Callable[[DType], tuple[Path, Manifest]]
MakeManifest = Callable[..., Manifest]

# Prefill, a decode, a chunk over two blocks, decodes.
CHUNKS = [40, 1, 50, 1, 1]


def chunks(text: list[int]) -> list[dict[str, list[int]]]:
    return [{"a": list(piece)} for piece in np.split(text, np.cumsum(CHUNKS)[:-1])]


def random_tokens(vocab_size: int) -> list[int]:
    return np.random.default_rng(0).integers(vocab_size, size=sum(CHUNKS)).tolist()


def relative_error(actual: Float32Array, expected: Float32Array) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# --------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize(
    ("dtype", "threads", "tolerance"),
    [("float32", 0, 1e-5), ("float32", 1, 1e-5), ("bfloat16", 2, 0.04), ("bfloat16", 1, 0.04)],
)
def test_logits_equal_hugging_face(
    export_tiny_llama: Export, tiny_llama: Path, drive: Drive, dtype: DType, threads: int, tolerance: float
) -> None:
    folder, manifest = export_tiny_llama(dtype)
    text = random_tokens(manifest.model.vocab_size)
    executor = OpenVINOExecutor(folder, manifest, threads=threads)
    logits = drive(executor, block_order=[7, 3, 20]).run(chunks(text))["a"]
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = hf(torch.tensor([text])).logits[0].numpy()
    assert relative_error(logits, expected) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_of_bytes(export_tiny_llama: Export, drive: Drive, dtype: DType) -> None:
    """Takes the memory that the manifest says, and blocks can be moved with their scales."""
    folder, manifest = export_tiny_llama(dtype)
    text = random_tokens(manifest.model.vocab_size)
    expected = drive(OpenVINOExecutor(folder, manifest, threads=2)).run(chunks(text))["a"]
    layout = manifest.kv_cache.model_copy(update={"dtype": "int8"})
    in_bytes = manifest.model_copy(update={"kv_cache": layout})
    executor = OpenVINOExecutor(folder, in_bytes, threads=2)
    num_tokens = layout.num_blocks * layout.block_size
    assert sum(cache.data.nbytes for cache in executor._caches) == num_tokens * layout.bytes_per_token
    assert layout.bytes_per_token < 0.8 * manifest.kv_cache.bytes_per_token
    driver = drive(executor, block_order=[7, 3, 20, 9])
    first = driver.run(chunks(text)[:-1])["a"]
    assert 0 < relative_error(first, expected[:-1]) < 0.1
    inputs = driver.inputs({"a": text[-1:]})
    last = executor.execute(inputs).logits.copy()
    # The same step again, from copies of all blocks.
    executor.move_blocks(BlockMoves(copies=[(7, 11), (3, 12), (20, 13)]))
    tables = np.array([[11, 12, 13]], np.int32)
    slots = tables[0, inputs.position_ids // 32] * 32 + inputs.position_ids % 32
    moved = replace(inputs, block_tables=tables, slot_mapping=slots.astype(np.int32))
    np.testing.assert_allclose(executor.execute(moved).logits, last, rtol=0, atol=0.02 * np.abs(last).max())


def test_bfloat16_model_runs_on_a_cpu_without_it(
    export_tiny_llama: Export, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with the bfloat16 weights: exact where bfloat16 steps are not."""
    folder, manifest = export_tiny_llama("bfloat16")
    text = random_tokens(manifest.model.vocab_size)
    as_this_cpu_can = OpenVINOExecutor(folder, manifest, threads=2)
    least_rounding = 1e-4 if has_bfloat16() else 0.0
    monkeypatch.setattr("trtforge.runtime.executors.openvino_executor.has_bfloat16", lambda: False)
    in_float32 = OpenVINOExecutor(folder, manifest, threads=2)
    whole = drive(in_float32).run([{"a": text}])["a"]
    assert relative_error(drive(in_float32).run(chunks(text))["a"], whole) < 1e-5
    assert least_rounding <= relative_error(drive(as_this_cpu_can).run(chunks(text))["a"], whole) < 0.04


def test_norms_rotary_embeddings_and_projections_are_fused(export_tiny_llama: Export) -> None:
    """The plugin recognizes them by their shape in the graph; where it does not, serving is slower."""
    for dtype in ("float32", "bfloat16"):
        folder, manifest = export_tiny_llama(dtype)
        model = read_graph(folder / "model.onnx", manifest.kv_cache.layers)
        hint = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
        nodes = ov.Core().compile_model(model, "CPU", hint).get_runtime_model().get_ops()
        kinds = [str(node.get_rt_info()["layerType"].astype(str)) for node in nodes]
        num_layers = len(manifest.kv_cache.layers)
        assert kinds.count("PagedAttention") == num_layers
        assert kinds.count("RoPE") == 2 * num_layers
        assert kinds.count("RMS") == 2 * num_layers + 1
        assert kinds.count("FullyConnected") <= 5 * num_layers + 1  # q, k and v are one
        # Two residuals and the gate of a layer, and the angles of the positions: no weights of norms.
        assert kinds.count("Eltwise") <= 3 * num_layers + 1


# --------------------------------------------------------------------------- attention alone


@dataclass(frozen=True)
class Attention:
    """One attention node; queries, keys and values are looked up by token."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    sinks: bool = False
    softcap: float = 0.0
    alibi: bool = False
    scaled_cache: bool = False

    @property
    def vocab_size(self) -> int:
        """The node's output rows are the graph's logits."""
        return self.num_heads * self.head_dim

    def weights(self) -> dict[str, Float32Array]:
        """q, k and v of every token, a sink and a slope a head, and the cache's scales."""
        rng = np.random.default_rng(1)
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        tables = {
            name: rng.standard_normal((self.vocab_size, count, self.head_dim), np.float32)
            for name, count in heads.items()
        }
        return tables | {
            "sinks": rng.standard_normal(self.num_heads, np.float32) * 3,
            "alibi_slopes": (2.0 ** -np.arange(1, self.num_heads + 1)).astype(np.float32),
            "k_scale": np.ones(1, np.float32),
            "v_scale": np.ones(1, np.float32),
        }

    def save(self, folder: Path) -> None:
        """Write model.onnx."""
        optional = {
            "sinks": self.sinks,
            "alibi_slopes": self.alibi,
            "k_scale": self.scaled_cache,
            "v_scale": self.scaled_cache,
        }
        used = {name: array for name, array in self.weights().items() if optional.get(name, True)}
        given = [name if name in used else "" for name in optional]
        while given and not given[-1]:
            given.pop()
        step = ["block_tables", "cu_seqlens", "context_lens", "slot_mapping"]
        nodes = [helper.make_node("Gather", [name, "input_ids"], [f"{name}_rows"]) for name in "qkv"]
        nodes += [
            helper.make_node(
                "PagedAttention",
                ["q_rows", "k_rows", "v_rows", "kv_cache.0", *step, *given],
                ["out", "kv_cache_out.0"],
                domain="trtforge",
                scale=self.head_dim**-0.5,
                window=self.window,
                softcap=self.softcap,
            ),
            helper.make_node("Reshape", ["out", "row_shape"], ["rows"]),
            helper.make_node("Gather", ["rows", "logits_indices"], ["logits"]),
        ]
        inputs = [helper.make_tensor_value_info(t.name, TensorProto.INT32, t.dims) for t in wire.GRAPH_INPUTS]
        cache_dims = ["num_blocks", 2, "block_size", self.num_kv_heads, self.head_dim]
        cache, cache_out = (
            helper.make_tensor_value_info(f"kv_cache{kind}.0", TensorProto.FLOAT, cache_dims)
            for kind in ("", "_out")
        )
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["R", self.vocab_size])
        initializers = [numpy_helper.from_array(array, name) for name, array in used.items()]
        initializers.append(numpy_helper.from_array(np.array([-1, self.vocab_size]), "row_shape"))
        graph = helper.make_graph(nodes, "attention", [*inputs, cache], [logits, cache_out], initializers)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trtforge", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), folder / "model.onnx")

    def expected(self, text: list[int]) -> Float32Array:
        """Attention as its definition says, row by row in float64."""
        weights = self.weights()
        q, k, v = (weights[name][text].astype(np.float64) for name in "qkv")
        rows = np.zeros((len(text), self.num_heads, self.head_dim))
        for t in range(len(text)):
            start = max(0, t + 1 - self.window) if self.window else 0
            for head in range(self.num_heads):
                kv_head = head * self.num_kv_heads // self.num_heads
                scores = k[start : t + 1, kv_head] @ q[t, head] * self.head_dim**-0.5
                if self.alibi:
                    scores += weights["alibi_slopes"][head] * np.arange(start - t, 1)
                exp = np.exp(scores)
                total = exp.sum() + (np.exp(weights["sinks"][head]) if self.sinks else 0)
                rows[t, head] = exp @ v[start : t + 1, kv_head] / total
        return rows.reshape(len(text), -1).astype(np.float32)


@pytest.mark.parametrize(
    "attention",
    [
        Attention(num_heads=4, num_kv_heads=4, head_dim=64),
        Attention(num_heads=6, num_kv_heads=2, head_dim=64),
        Attention(num_heads=8, num_kv_heads=1, head_dim=8),
        Attention(num_heads=2, num_kv_heads=1, head_dim=80),
        Attention(num_heads=2, num_kv_heads=2, head_dim=96),
        Attention(num_heads=2, num_kv_heads=1, head_dim=128),
        Attention(num_heads=2, num_kv_heads=1, head_dim=256),
        Attention(num_heads=4, num_kv_heads=2, head_dim=64, window=1),
        Attention(num_heads=4, num_kv_heads=2, head_dim=64, window=16),
        Attention(num_heads=4, num_kv_heads=2, head_dim=64, window=33),
        Attention(num_heads=4, num_kv_heads=2, head_dim=64, sinks=True),
        Attention(num_heads=4, num_kv_heads=2, head_dim=64, window=20, sinks=True),
        Attention(num_heads=4, num_kv_heads=2, head_dim=64, alibi=True),
        Attention(num_heads=4, num_kv_heads=2, head_dim=64, sinks=True, alibi=True),
    ],
    ids=str,
)
def test_attention_equals_its_definition(
    attention: Attention, make_manifest: MakeManifest, drive: Drive, tmp_path: Path
) -> None:
    attention.save(tmp_path)
    layer = LayerCache(num_kv_heads=attention.num_kv_heads, head_dim=attention.head_dim)
    executor = OpenVINOExecutor(tmp_path, make_manifest((layer,), vocab_size=attention.vocab_size), threads=2)
    text = random_tokens(attention.vocab_size)
    expected = attention.expected(text)
    whole = drive(executor).run([{"a": text}])["a"]
    chunked = drive(executor, block_order=[9, 2, 5]).run(chunks(text))["a"]
    assert relative_error(whole, expected) < 1e-5
    assert relative_error(chunked, expected) < 1e-5


def test_operator_has_the_inputs_this_release_had() -> None:
    """It is internal to OpenVINO and changes between releases. A wrong rank makes it name its input."""

    def unknown() -> Any:
        return ops.parameter(ov.PartialShape.dynamic(), ov.Type.dynamic).output(0)

    names = []
    for index in range(len(PAGED_ATTENTION_INPUTS)):
        inputs = [unknown() for _ in PAGED_ATTENTION_INPUTS]
        inputs[index] = ops.parameter([1] * 7, ov.Type.f64).output(0)
        with pytest.raises(RuntimeError) as refused:
            _PagedAttentionExtension(inputs)
        names += re.findall(r"Rank of `(\w+)` input should be", str(refused.value))
    assert tuple(names) == PAGED_ATTENTION_INPUTS
    for wrong_number in (len(names) - 1, len(names) + 1):
        with pytest.raises(RuntimeError, match="get_input_size"):
            _PagedAttentionExtension([unknown() for _ in range(wrong_number)])


@pytest.mark.parametrize("biased", [False, True])
def test_merged_projections_compute_the_same(biased: bool) -> None:
    rng = np.random.default_rng(0)
    x = ops.parameter([-1, 16], ov.Type.f32)
    outputs = []
    for size in (8, 4, 12):
        y = ops.matmul(x, ops.constant(rng.standard_normal((size, 16), np.float32)), False, True)
        outputs.append(ops.add(y, ops.constant(np.float32(size))) if biased else ops.relu(y))
    model = ov.Model(outputs, [x])
    rows = rng.standard_normal((5, 16), np.float32)
    float32 = {"INFERENCE_PRECISION_HINT": "f32"}
    before = list(ov.compile_model(model, "CPU", float32)(rows).values())
    merge_projections(model)
    kinds = [node.get_type_name() for node in model.get_ordered_ops()]
    assert kinds.count("MatMul") == (3 if biased else 1)
    after = ov.compile_model(model, "CPU", float32)(rows).values()
    for expected, actual in zip(before, after, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------- refusals


def _error(kind: type[TrtforgeError], match: str, folder: Path, manifest: Manifest, threads: int = 1) -> None:
    with pytest.raises(kind, match=match):
        OpenVINOExecutor(folder, manifest, threads=threads)


def test_manifests_that_openvino_cannot_serve(make_manifest: MakeManifest, tmp_path: Path) -> None:
    attention = Attention(num_heads=2, num_kv_heads=1, head_dim=16)
    attention.save(tmp_path)
    layers = (LayerCache(num_kv_heads=1, head_dim=16),)
    _error(ConfigError, "float16.*float32 or bfloat16", tmp_path, make_manifest(layers, dtype="float16"))
    _error(ConfigError, "blocks of 32 tokens, not 16", tmp_path, make_manifest(layers, block_size=16))
    mixed = make_manifest(layers, dtype="bfloat16", kv_cache_dtype="float32")
    _error(ConfigError, "KV cache of float32.*bfloat16", tmp_path, mixed)
    _error(ConfigError, "threads is -1", tmp_path, make_manifest(layers), threads=-1)
    _error(ConfigError, "1 cache inputs, its manifest 2 layers", tmp_path, make_manifest(layers * 2))
    manifest = make_manifest(layers)
    rank = manifest.ranks[0].model_copy(update={"onnx": "gone/model.onnx"})
    moved = manifest.model_copy(update={"ranks": (rank,)})
    _error(ConfigError, "gone/model.onnx does not exist: build", tmp_path, moved)
    huge = make_manifest(layers, num_blocks=2**50)
    _error(CapacityError, "cache", tmp_path, huge)


def test_graphs_that_openvino_cannot_execute(make_manifest: MakeManifest, tmp_path: Path) -> None:
    manifest = make_manifest((LayerCache(num_kv_heads=1, head_dim=16),))
    Attention(num_heads=2, num_kv_heads=1, head_dim=16, softcap=30.0).save(tmp_path)
    _error(ConfigError, "softcap 30", tmp_path, manifest)
    Attention(num_heads=2, num_kv_heads=1, head_dim=16, scaled_cache=True).save(tmp_path)
    _error(ConfigError, "k_scale", tmp_path, manifest)
    Attention(num_heads=2, num_kv_heads=1, head_dim=16, window=8, alibi=True).save(tmp_path)
    _error(ConfigError, "alibi_slopes in a window of 8", tmp_path, manifest)

    Attention(num_heads=2, num_kv_heads=1, head_dim=16).save(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx")
    experts = helper.make_node(
        "MoeExperts", ["rows", "logits_indices", "rows"], ["unused"], domain="trtforge"
    )
    graph.graph.node.append(experts)
    onnx.save(graph, tmp_path / "model.onnx")
    _error(ConfigError, "MoeExperts", tmp_path, manifest)

    del graph.graph.node[-1]
    graph.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(graph, tmp_path / "model.onnx")
    _error(EngineBuildError, "NoSuchOperator", tmp_path, manifest)

    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    _error(ConfigError, "not an ONNX file", tmp_path, manifest)


def test_weights_that_are_missing_cut_or_elsewhere(export_tiny_llama: Export, tmp_path: Path) -> None:
    folder, manifest = export_tiny_llama("float32")
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (weights,) = copy.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1024])
    _error(ConfigError, "cut short: build", copy, manifest)
    weights.unlink()
    _error(ConfigError, "missing", copy, manifest)
    weights.symlink_to(folder / weights.name)
    _error(ConfigError, "link out of its folder", copy, manifest)


def test_tokens_that_are_not_to_be_stored_are_refused(export_tiny_llama: Export, drive: Drive) -> None:
    folder, manifest = export_tiny_llama("float32")
    executor = OpenVINOExecutor(folder, manifest, threads=2)
    inputs = drive(executor).inputs({"a": [1, 2, 3]})
    inputs.slot_mapping[1] = -1
    with pytest.raises(ValueError, match="slot_mapping"):
        executor.execute(inputs)


def test_closed_executor_says_so(export_tiny_llama: Export, drive: Drive) -> None:
    folder, manifest = export_tiny_llama("float32")
    executor = OpenVINOExecutor(folder, manifest, threads=2)
    inputs = drive(executor).inputs({"a": [1, 2, 3]})
    executor.close()
    with pytest.raises(ServerError, match="closed"):
        executor.execute(inputs)

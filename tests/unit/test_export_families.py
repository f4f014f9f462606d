"""Every family of decoders becomes one packed graph that computes what Hugging Face computes.

Tiny random models are saved as checkpoints and exported from the meta device. The files are run by ONNX
Runtime through the operators' function bodies, and by the reference executor, in steps that mix prefill,
chunked prefill and decode. The graphs of some families are also lowered for TensorRT-RTX and built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from trtforge import wire
from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.engine import Network, choose_target
from trtforge.builder.engine_facts import EngineTensor
from trtforge.builder.export import (
    ExportedModel,
    TracedModel,
    divide,
    trace_checkpoint,
    write_graph,
)
from trtforge.builder.inspection.layer import find_layer
from trtforge.builder.lower import lower
from trtforge.builder.profiles import make_profiles
from trtforge.builder.sharding.split import Parallelism
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.manifest import KVCacheLayout, Limits, Manifest
from trtforge.runtime.executors.graph_file import read_graph_file
from trtforge.runtime.executors.reference_executor import ReferenceExecutor
from trtforge.runtime.executors.torch_graph import Node, compile_graph
from trtforge.runtime.executors.torch_operation import Operation, torch_dtype

BLOCK_SIZE = 4
NUM_BLOCKS = 24

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

# name: (model type, what differs from TINY)
FAMILIES = {
    "llama": ("llama", {}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", WINDOW),
    "ministral": ("ministral", {"head_dim": 16, **WINDOW}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, **WINDOW}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2, **WINDOW},
    ),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, **WINDOW}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    ),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", WINDOW),
    "glm4": ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "exaone4": ("exaone4", {"head_dim": 16, "sliding_window_pattern": 2, **WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 48, **MOE}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "head_dim": 16, "norm_topk_prob": True, **MOE}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, **WINDOW}),
    "deepseek_v3": ("deepseek_v3", {**MOE, **DEEPSEEK}),
}


def save_random_model(family: str, folder: Path) -> None:
    """A checkpoint with every parameter and buffer random; norms around 1, nothing left at 0."""
    model_type, differences = FAMILIES[family]
    torch.manual_seed(len(family))
    config = AutoConfig.for_model(model_type, **(TINY | differences))
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for name, buffer in hf.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    hf.save_pretrained(folder)


@dataclass(frozen=True)
class Family:
    """An exported model, a schedule of steps, and the logits that Hugging Face has for each text."""

    folder: Path
    traced: TracedModel
    exported: ExportedModel
    steps: list[tuple[dict[str, list[int]], int]]  # new tokens by text, and rows of padding
    expected: dict[str, np.ndarray]

    def check(self, logits: dict[str, np.ndarray]) -> None:
        for name, expected in self.expected.items():
            np.testing.assert_allclose(logits[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    save_random_model(request.param, folder / "hf")
    traced = trace_checkpoint(Checkpoint.open(str(folder / "hf")), "float32", lambda _: None)
    (exported,) = divide(traced, Parallelism()).ranks
    write_graph(exported, folder / "graph")

    rng = np.random.default_rng(1)
    texts = {name: rng.integers(3, 128, size).tolist() for name, size in (("a", 13), ("b", 9), ("c", 5))}
    a, b, c = texts.values()
    steps = [
        ({"a": a[:7], "b": b[:6]}, 0),  # two prefills, the first one a chunk
        ({"a": a[7:12], "b": b[6:7], "c": c[:4]}, 3),  # a chunk, a decode and a prefill, then padding
        ({"c": c[4:], "a": a[12:], "b": b[7:8]}, 0),  # decodes, in another order
        ({"b": b[8:]}, 2),
    ]
    hf = AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        expected = {
            name: hf(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
            for name, tokens in texts.items()
        }
    return Family(folder / "graph", traced, exported, steps, expected)


@pytest.fixture
def check_graph(
    family: Family, make_manifest: Callable[..., Manifest], drive: Callable[..., Any]
) -> Callable[[str], None]:
    """`check_graph(file)`: in ONNX Runtime, that graph of the family computes what Hugging Face does."""

    def check(file: str) -> None:
        manifest = make_manifest(family.exported.layers, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
        rank = manifest.ranks[0].model_copy(update={"onnx": file})
        manifest = manifest.model_copy(update={"ranks": (rank,)})
        blocks = np.random.default_rng(0).permutation(NUM_BLOCKS).tolist()
        driver = drive(OnnxRuntimeModel(family.folder, manifest), blocks)
        logits: dict[str, list[np.ndarray]] = {name: [] for name in family.expected}
        for new_tokens, num_padding in family.steps:
            for name, rows in driver.step(new_tokens, num_padding).items():
                logits[name].append(rows)
        family.check({name: np.concatenate(rows) for name, rows in logits.items()})

    return check


def test_packed_steps_equal_hugging_face(check_graph: Callable[[str], None]) -> None:
    check_graph("model.onnx")


def test_reference_executor_equals_hugging_face(
    family: Family, make_manifest: Callable[..., Manifest], drive: Callable[..., Any]
) -> None:
    manifest = make_manifest(family.exported.layers, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    executor = ReferenceExecutor(family.folder, manifest, device=torch.device("cpu"))
    blocks = np.random.default_rng(0).permutation(NUM_BLOCKS).tolist()
    family.check(drive(executor, blocks).run(new_tokens for new_tokens, _ in family.steps))


# 4 query heads and, in most families, 2 KV heads: whole groups, parts of them, one head each.
PARALLELISMS = [(2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]


def test_ranks_together_equal_hugging_face(
    family: Family,
    make_threaded_ranks: Callable[..., Any],
    drive: Callable[..., Any],
    tmp_path: Path,
) -> None:
    for tp, pp in PARALLELISMS:
        ranks = divide(family.traced, Parallelism(tp, pp)).ranks
        model = make_threaded_ranks(ranks, tp, tmp_path / f"{tp}x{pp}", BLOCK_SIZE, NUM_BLOCKS)
        blocks = np.random.default_rng(0).permutation(NUM_BLOCKS).tolist()
        family.check(drive(model, blocks).run(new_tokens for new_tokens, _ in family.steps))
        if tp == 1:
            continue
        # Projections and embeddings are divided, but for a few: routers, what leads to a latent state.
        weights = family.traced.model.graph.initializers
        whole = [
            name
            for name, part in ranks[0].model.graph.initializers.items()
            if name in weights and len(part.shape) > 1 and part.shape == weights[name].shape
        ]
        assert not [name for name in whole if not name.endswith(WHOLE)]


# Routers and gates of one number; of latent attention what all heads share, and what is padded to its width.
WHOLE = (
    "gate.weight",
    "router.weight",
    "down_proj_bias",
    "wpe.weight",
    "embed_positions.weight",
    "q_a_proj.weight",
    "kv_a_proj_with_mqa.weight",
    "kv_b_proj.weight",
)


def test_standard_operators_never_wait_for_the_device(family: Family) -> None:
    """A CUDA graph could not contain them. Tensors of the meta device have no data that could be read."""

    def nothing_but_shapes(node: Node) -> Operation:
        if node.op_type == "Linear":
            return functional.linear
        # The first input's shape is the first output's, the cache is the second output.
        return lambda *inputs: inputs[:1] if len(node.outputs) == 1 else (inputs[0], inputs[3])

    meta = torch.device("meta")
    graph = read_graph_file(family.folder / "model.onnx", len(family.exported.layers))
    program = compile_graph(graph, family.folder, meta, nothing_but_shapes)
    sizes = {"T": 5, "R": 3, "B": 2, "B_plus_1": 3, "max_blocks": 4, "num_blocks": 7, "block_size": 4}
    inputs = {
        value.name: torch.empty(
            [dim.dim_value or sizes[dim.dim_param] for dim in value.type.tensor_type.shape.dim],
            dtype=torch_dtype(value.type.tensor_type.elem_type),
            device=meta,
        )
        for value in graph.input
    }
    assert program.run(inputs).shape == (3, 128)


# Norms of both kinds, windows in some or all layers, softcaps, sinks, experts, biases, partial rotation.
ENGINE_FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "mixtral", "gpt_oss")


@pytest.mark.parametrize("family", ENGINE_FAMILIES, indirect=True)
def test_lowered_graph_equals_hugging_face_and_builds_into_an_engine(
    family: Family, check_graph: Callable[[str], None], tensorrt_rtx: ModuleType
) -> None:
    lowered = ir.to_proto(lower(family.folder / "model.onnx", BLOCK_SIZE))
    onnx.save(lowered, family.folder / "lowered.onnx")
    check_graph("lowered.onnx")
    # 0, 1, … of the rows of the longest sequence: in front of the layers, not in each of them.
    assert [node.op_type for node in lowered.graph.node].count("Range") == 1

    network = Network(lowered.SerializeToString(), family.folder / "model.onnx", "tensorrt_rtx")
    layers = family.exported.layers
    caches = [
        (index, ("num_blocks", 2, BLOCK_SIZE, layer.num_kv_heads, layer.head_dim))
        for index, layer in enumerate(layers)
    ]
    assert network.inputs() == (
        *(EngineTensor(name=t.name, dtype=t.dtype, dims=t.dims) for t in wire.GRAPH_INPUTS),
        *(EngineTensor(name=wire.kv_cache_input(i), dtype="float32", dims=dims) for i, dims in caches),
    )
    assert network.outputs() == (
        EngineTensor(name=wire.LOGITS, dtype="float32", dims=(-1, family.exported.vocab_size)),
        *(
            EngineTensor(name=wire.kv_cache_output(i), dtype="float32", dims=(-1, *dims[1:]))
            for i, dims in caches
        ),
    )
    kv_cache = KVCacheLayout(dtype="float32", block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, layers=layers)
    limits = Limits(max_model_len=64, max_num_seqs=8, max_num_batched_tokens=32)
    profiles = make_profiles("tensorrt_rtx", limits, kv_cache)
    assert network.build(choose_target("tensorrt-rtx"), profiles).nbytes > 0.9 * family.exported.weight_bytes


def test_each_layer_is_found_whole(family: Family) -> None:
    """Whatever its weights are called and however its residuals run."""
    model = ir.load(family.folder / "model.onnx")
    layers = [find_layer(model, index) for index in range(2)]
    for index, layer in enumerate(layers):
        assert layer.weight_prefix.endswith(f".{index}.")
        used = {value.name for node in layer.nodes for value in node.inputs if value is not None}
        owned = {name for name in model.graph.initializers if name.startswith(layer.weight_prefix)}
        assert owned
        assert owned <= used
        assert sum(node.op_type == "PagedAttention" for node in layer.nodes) == 1
    first, second = (set(layer.nodes) for layer in layers)
    assert not first & second
    # Nothing is left out between them, and only one hidden state goes from one to the other.
    leaving = {value for node in first for value in node.outputs if not first.issuperset(value.consumers())}
    (hidden_state,) = (value for value in leaving if not value.is_graph_output())
    assert second.issuperset(hidden_state.consumers())
    # What else the second layer takes from other nodes, others take too.
    entering = {value for node in second for value in node.inputs if value is not None} - {hidden_state}
    for value in entering:
        assert (
            value.producer() is None or value.producer() in second or not second.issuperset(value.consumers())
        )

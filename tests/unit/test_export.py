"""The exported graph's interface and files, and models that are refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from trtforge import wire
from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import ExportedModel, export_model, write_graph
from trtforge.builder.hooks import Hooks
from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.trace import trace
from trtforge.errors import ExportError
from trtforge.integrity import file_digest
from trtforge.plugins.function_bodies import add_function_bodies

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


def save(folder: Path, model_type: str, **differences: object) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | differences))
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hf.generation_config.eos_token_id = [2, 5]
    hf.save_pretrained(folder)
    return folder


def step_inputs() -> dict[str, np.ndarray]:
    """One prefill of five tokens in blocks of four."""
    inputs = {
        "input_ids": [9, 8, 7, 6, 5],
        "position_ids": range(5),
        "block_tables": [[2, 0]],
        "cu_seqlens": [0, 5],
        "context_lens": [5],
        "slot_mapping": [8, 9, 10, 11, 0],
        "logits_indices": [4, 0],
    }
    return {name: np.array(value, np.int32) for name, value in inputs.items()}


def run(folder: Path, exported: ExportedModel, dtype: type) -> np.ndarray:
    """Logits of `step_inputs` by ONNX Runtime, [2, V]."""
    graph = folder / "with_bodies.onnx"
    onnx.save(add_function_bodies(onnx.load(folder / "model.onnx", load_external_data=False)), graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    feeds = step_inputs()
    for index, layer in enumerate(exported.layers):
        feeds[wire.kv_cache_input(index)] = np.zeros((3, 2, 4, layer.num_kv_heads, layer.head_dim), dtype)
    return session.run([wire.LOGITS], feeds)[0]


def hf_logits(folder: Path, dtype: torch.dtype) -> np.ndarray:
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        logits = hf(torch.tensor(step_inputs()["input_ids"][None]), use_cache=False).logits[0]
    return logits[[4, 0]].float().numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportedModel, Path]:
    """A tied bfloat16 checkpoint, exported as float32, and the folder that it was written to."""
    checkpoint = save(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=True)
    exported = export_model(Checkpoint.open(str(checkpoint)), "float32")
    folder = tmp_path_factory.mktemp("graph")
    write_graph(exported, folder)
    return checkpoint, exported, folder


def test_interface_is_the_declared_one(llama: tuple[Path, ExportedModel, Path]) -> None:
    _, exported, folder = llama
    graph = ir.from_proto(onnx.load(folder / "model.onnx", load_external_data=False)).graph
    inputs = {value.name: value for value in graph.inputs}
    cache = ("num_blocks", 2, "block_size", 2, 16)
    expected = {tensor.name: ("INT32", tensor.dims) for tensor in wire.GRAPH_INPUTS}
    expected |= {wire.kv_cache_input(layer): ("FLOAT", cache) for layer in range(2)}
    assert list(inputs) == list(expected)
    for name, (dtype, dims) in expected.items():
        assert (inputs[name].dtype.name, dims_of(inputs[name])) == (dtype, dims)
    outputs = {value.name: (value.dtype.name, dims_of(value)) for value in graph.outputs}
    assert outputs == {
        wire.LOGITS: ("FLOAT", ("R", 128)),
        wire.kv_cache_output(0): ("FLOAT", cache),
        wire.kv_cache_output(1): ("FLOAT", cache),
    }
    assert exported.vocab_size == 128
    assert [(layer.num_kv_heads, layer.head_dim) for layer in exported.layers] == [(2, 16)] * 2
    assert exported.eos_token_ids == (2, 5)
    assert exported.architecture == "LlamaForCausalLM"


def dims_of(value: ir.Value) -> tuple[str | int, ...]:
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def test_projections_keep_the_names_and_layout_of_their_weights(
    llama: tuple[Path, ExportedModel, Path],
) -> None:
    checkpoint, exported, _ = llama
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    nodes = Counter((node.domain, node.op_type) for node in exported.model.graph)
    linears = {node.inputs[1].name for node in exported.model.graph if node.op_type == "Linear"}
    names = {f"{name}.weight" for name, module in hf.named_modules() if isinstance(module, torch.nn.Linear)}
    # The tied output projection shares the embedding's one initializer.
    assert linears == names - {"lm_head.weight"} | {"model.embed_tokens.weight"}
    assert nodes["trtforge", "PagedAttention"] == 2
    assert nodes["", "RotaryEmbedding"] == 4
    assert nodes["", "MatMul"] == 0
    for node in exported.model.graph:
        if node.domain == "trtforge":
            assert node.attributes["plugin_namespace"].value == "trtforge"
            assert node.attributes["plugin_version"].value == "1"
    initializers = exported.model.graph.initializers
    for name, parameter in hf.named_parameters():
        np.testing.assert_array_equal(initializers[name].const_value.numpy(), parameter.detach().numpy())
    assert exported.num_parameters == sum(parameter.numel() for parameter in hf.parameters())
    assert exported.num_nodes == sum(nodes.values())
    assert 0 <= exported.weight_bytes - 4 * exported.num_parameters < 1000  # a few constants


def test_written_files_need_nothing_else(llama: tuple[Path, ExportedModel, Path], tmp_path: Path) -> None:
    checkpoint, exported, folder = llama
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    hidden = checkpoint.rename(tmp_path / "hidden")
    try:
        logits = run(moved, exported, np.float32)
    finally:
        hidden.rename(checkpoint)
    expected = hf_logits(checkpoint, torch.float32)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_graph_can_be_written_twice(llama: tuple[Path, ExportedModel, Path], tmp_path: Path) -> None:
    _, exported, folder = llama
    for file, digest in write_graph(exported, tmp_path).items():
        assert file.read_bytes() == (folder / file.name).read_bytes()
        assert digest == file_digest(file)


def test_half_precision(llama: tuple[Path, ExportedModel, Path], tmp_path: Path) -> None:
    checkpoint, _, _ = llama
    exported = export_model(Checkpoint.open(str(checkpoint)), "float16")
    write_graph(exported, tmp_path)
    dtypes = {
        value.dtype.name for value in exported.model.graph.initializers.values() if "weight" in value.name
    }
    assert dtypes == {"FLOAT16"}
    expected = hf_logits(checkpoint, torch.float16)
    logits = run(tmp_path, exported, np.float16)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-3 * np.abs(expected).max())


def test_checkpoints_in_the_graph_s_dtype_are_copied(
    llama: tuple[Path, ExportedModel, Path], tmp_path: Path
) -> None:
    checkpoint, _, _ = llama
    opened = Checkpoint.open(str(checkpoint))
    exported = export_model(opened, "bfloat16")
    progress: list[tuple[int, int]] = []
    write_graph(exported, tmp_path, on_bytes=lambda done, total: progress.append((done, total)))
    shutil.copy(checkpoint / "config.json", tmp_path)
    written = Checkpoint.open(str(tmp_path))
    assert written.tensors.keys() == opened.tensors.keys()
    for name, entry in opened.tensors.items():
        assert bytes_of(written.tensors[name]) == bytes_of(entry), name
    total = sum(entry.nbytes for entry in opened.tensors.values())
    assert progress[-1] == (total, total)


def bytes_of(entry) -> bytes:
    return entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes]


# --------------------------------------------------------------------------- hooks


def globals_that_hooks_touch() -> list[object]:
    return [
        dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        dict(ALL_EXPERTS_FUNCTIONS._global_mapping),
        {
            name: value
            for name, value in vars(modeling_llama).items()
            if name.startswith(("create_", "apply_"))
        },
    ]


def test_hooks_leave_nothing_behind() -> None:
    before = globals_that_hooks_touch()
    hf = build_meta_model(AutoConfig.for_model("llama", **TINY), torch.float32)
    implementation = hf.config._attn_implementation

    def fail_with_hooks_installed() -> None:
        with Hooks(hf).installed():
            assert globals_that_hooks_touch() != before
            assert hf.config._attn_implementation != implementation
            with pytest.raises(ExportError, match="one after the other"), Hooks(hf).installed():
                pass
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail_with_hooks_installed()
        assert globals_that_hooks_touch() == before
        assert hf.config._attn_implementation == implementation


def test_a_failing_model_gives_a_reason_and_leaves_nothing_behind(
    llama: tuple[Path, ExportedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    before = globals_that_hooks_touch()
    with pytest.raises(ExportError, match="llama cannot be traced: no such luck"):
        export_model(Checkpoint.open(str(llama[0])), "float32")
    assert globals_that_hooks_touch() == before


# --------------------------------------------------------------------------- refusals

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
}
REFUSED = {
    "attention-of-its-own": ("bloom", {}, "bloom has 2 layers, .* attention interface 0 times"),
    "falcon": ("falcon", {}, "falcon.*attention interface"),
    "more-attention-than-layers": ("diffllama", {}, "diffllama has 2 layers, .* 4 times"),
    "encoder-decoder": ("t5", {"d_model": 64, "num_layers": 2}, "t5 is an encoder-decoder"),
    "encoder-decoder-with-a-decoder-class": ("bart", {}, "bart is an encoder-decoder"),
    "not-causal": ("bert", {}, "bert attends through create_bidirectional_mask"),
    "mask-of-its-own": (
        "gemma3_text",
        {"head_dim": 16, "use_bidirectional_attention": True},
        "or_mask_function",
    ),
    "chunked-attention": (
        "llama4_text",
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96},
        "llama4_text has layers of type chunked_attention",
    ),
    "recurrent-layers": ("mamba", {"state_size": 4}, "mamba has layers of type linear_attention"),
    "batch-dependent-rope": ("phi3", {"rope_parameters": LONGROPE}, "phi3 with rope type 'longrope'"),
    "unknown-rotation": (
        "gptj",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "gptj: .* rotation",
    ),
    "unknown-activation": (
        "mixtral",
        {"num_local_experts": 2, "hidden_act": "relu"},
        "MixtralExperts: the way its experts combine gate and up",
    ),
    "no-language-model": ("vit", {}, "no decoder for vit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models_get_a_reason(case: str) -> None:
    model_type, differences, message = REFUSED[case]
    config = AutoConfig.for_model(model_type, **(TINY | differences))
    with pytest.raises(ExportError, match=message):
        trace(build_meta_model(config, torch.float32), torch.float32, lambda _: None)


def test_a_rotation_convention_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: original(q, k, cos, -sin)
    )
    hf = build_meta_model(AutoConfig.for_model("llama", **TINY), torch.float32)
    with pytest.raises(ExportError, match="llama: its apply_rotary_pos_emb follows a rotation convention"):
        trace(hf, torch.float32, lambda _: None)


def test_windows_come_from_the_mask_where_attention_is_not_told() -> None:
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("qwen2_moe", shared_expert_intermediate_size=16, **(TINY | window | moe))
    model, _ = trace(build_meta_model(config, torch.float32), torch.float32, lambda _: None)
    windows = [node.attributes["window"].value for node in model.graph if node.op_type == "PagedAttention"]
    assert sorted(windows) == [0, 6]

"""Weights found in checkpoint files are, byte for byte, what transformers loads."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.checkpoint_weights import locate_weights
from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.weights import IR_DTYPES, CheckpointTensor
from trtforge.builder.weights_file import write_weights
from trtforge.errors import ExportError
from trtforge.integrity import file_digest

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IR_OF = {
    torch.float32: ir.DataType.FLOAT,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
}


def save(
    folder: Path, model_type: str, dtype: str = "float32", **differences: object
) -> dict[str, torch.Tensor]:
    """Save a random model; returns the tensors that were stored."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | differences))
    AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def located(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """All weights of the model in `folder`, as a graph of `dtype` would get them."""
    checkpoint = Checkpoint.open(str(folder))
    hf = build_meta_model(checkpoint.config, DTYPES[dtype])
    state = hf.state_dict()
    result = {}
    for name, source in locate_weights(hf, checkpoint).items():
        tensor = CheckpointTensor(IR_OF[state[name].dtype], source)
        data = torch.frombuffer(bytearray(tensor.tobytes()), dtype=state[name].dtype)
        result[name] = data.reshape(source.shape)
    return result


def loaded(folder: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).state_dict()


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES = {
    "plain": ("llama", {"attention_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "experts-in-a-list": ("qwen3_moe", MOE),
    "experts-renamed": ("mixtral", {"num_local_experts": 3}),
    "experts-stacked": ("gpt_oss", {"num_local_experts": 3, "head_dim": 8}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_transformers_loads(case: str, dtype: str, tmp_path: Path) -> None:
    model_type, differences = CASES[case]
    save(tmp_path, model_type, "bfloat16", **differences)
    assert_same(located(tmp_path, dtype), loaded(tmp_path, dtype))


def test_float32_parts_of_a_half_precision_model(tmp_path: Path) -> None:
    latent = {
        "kv_lora_rank": 16,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    routed = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    save(tmp_path, "deepseek_v3", num_key_value_heads=4, **latent, **routed)
    weights = located(tmp_path, "bfloat16")
    assert_same(weights, loaded(tmp_path, "bfloat16"))
    assert weights["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_names_without_the_base_model_s_prefix(tmp_path: Path) -> None:
    stored = save(tmp_path, "gpt2", n_embd=32, n_layer=2, n_head=4)
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in stored.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert_same(located(tmp_path), loaded(tmp_path))


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_that_are_stored_twice(same: bool, tmp_path: Path) -> None:
    stored = save(tmp_path, "llama", tie_word_embeddings=True)
    embedding = stored["model.embed_tokens.weight"]
    stored["lm_head.weight"] = embedding.clone() if same else embedding + 1
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(located(tmp_path), loaded(tmp_path))
    checkpoint = Checkpoint.open(str(tmp_path))
    hf = build_meta_model(checkpoint.config, torch.float32)
    locate_weights(hf, checkpoint)
    assert (hf.lm_head.weight is hf.model.embed_tokens.weight) == same


def test_missing_weights_are_named(tmp_path: Path) -> None:
    stored = save(tmp_path, "llama")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        located(tmp_path)


def test_a_missing_expert(tmp_path: Path) -> None:
    stored = save(tmp_path, "qwen3_moe", **MOE)
    del stored["model.layers.0.mlp.experts.1.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
        located(tmp_path)


def test_shapes_that_contradict_the_config(tmp_path: Path) -> None:
    stored = save(tmp_path, "llama")
    stored["model.norm.weight"] = torch.ones(31)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"model\.norm\.weight has shape \[31\].*\[32\]"):
        located(tmp_path)


def test_values_beyond_float16(tmp_path: Path) -> None:
    stored = save(tmp_path, "llama")
    stored["model.norm.weight"][3] = 1e6
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"model\.norm\.weight .* beyond the range of float16"):
        located(tmp_path, "float16")


def test_weights_file_is_a_safetensors_file(tmp_path: Path) -> None:
    stored = save(tmp_path, "qwen3_moe", "bfloat16", **MOE)
    checkpoint = Checkpoint.open(str(tmp_path))
    sources = locate_weights(build_meta_model(checkpoint.config, torch.float32), checkpoint)
    values = []
    for name, source in sources.items():
        dtype = IR_DTYPES["F32" if "proj" in name else "BF16"]
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(source.shape))
        value.const_value = CheckpointTensor(dtype, source)
        values.append(value)
    progress: list[tuple[int, int]] = []
    file = tmp_path / "out.safetensors"
    digest = write_weights(values, file, lambda done, total: progress.append((done, total)))
    assert digest == file_digest(file)

    written = load_file(file)
    expected = loaded(tmp_path, "bfloat16")
    assert written.keys() == sources.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert {tensor.dtype for tensor in written.values()} == {torch.float32, torch.bfloat16}
    for value in values:  # what ONNX will read, by offset and length
        assert (
            value.const_value.tobytes()
            == written[value.name].contiguous().view(torch.uint8).numpy().tobytes()
        )
    assert progress[-1][0] == progress[-1][1] == sum(t.nbytes for t in written.values())
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert len(stored) > len(written)  # three experts became one weight

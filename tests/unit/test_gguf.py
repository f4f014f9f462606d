"""GGUF files, made by the format's own writer and quantizers: what their tensors mean, and whole builds."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from trtforge.builder.build import build
from trtforge.builder.checkpoint import Checkpoint, TensorEntry
from trtforge.builder.export import export_model, write_graph
from trtforge.builder.options import BuildOptions
from trtforge.builder.quantization.gguf_blocks import unpack_blocks
from trtforge.builder.quantization.weights import ComputedWeight, QuantizedLinear
from trtforge.builder.tokenizer import write_tokenizer
from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.errors import ConfigError, ExportError
from trtforge.manifest import Manifest
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

Drive = Callable[..., Any]
MakeManifest = Callable[..., Manifest]

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
TEXT = np.random.default_rng(0).integers(128, size=40).tolist()
# By the part of a name; the first that fits.
KINDS = {
    "attn_q": Kind.Q8_0,
    "attn_k": Kind.Q4_0,
    "attn_v": Kind.F16,
    "ffn_up": Kind.Q4_1,
    "ffn_down": Kind.Q5_1,
    "ffn_gate": Kind.BF16,
    "output.weight": Kind.Q8_0,
    "token_embd": Kind.Q8_0,
}


def random_blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Rows of any bytes, with scales of a sensible size: there is no quantizer for every format."""
    rng = np.random.default_rng(int(kind))
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(256, size=(rows, columns // numbers, nbytes)).astype(np.uint8)
    halves = rng.uniform(-0.02, 0.02, (rows, columns // numbers, 2)).astype(np.float16)
    blocks[..., :4] = halves.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_numbers_are_the_format_s(kind: Kind) -> None:
    rows = random_blocks(kind, 5, 512)
    expected = gguf.quants.dequantize(rows, kind)
    weight = unpack_blocks(kind.name, rows)
    assert weight.values.max() <= (127 if kind == Kind.Q8_0 else 15)
    np.testing.assert_allclose(weight.dequantize(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_blocks_whose_numbers_are_all_the_same() -> None:
    """They have no scale."""
    weight = np.repeat(np.array([[0.5], [0.0]], np.float32), 32, axis=1)
    rows = gguf.quants.quantize(weight, Kind.Q4_1)
    np.testing.assert_array_equal(unpack_blocks("Q4_1", rows).dequantize(), weight)


# --------------------------------------------------------------------------- files


def tensors_of(architecture: str, head_dim: int) -> dict[str, np.ndarray]:
    """A random model's, by llama.cpp's names; rows of q and k are in its order."""
    rng = np.random.default_rng(1)
    shapes = {
        "token_embd.weight": (512, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (512, HIDDEN),
    }
    for layer in range(LAYERS):
        heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        parts: dict[str, tuple[int, ...]] = {f"attn_{n}": (h * head_dim, HIDDEN) for n, h in heads.items()}
        parts |= {"attn_output": (HIDDEN, HEADS * head_dim)}
        parts |= {"ffn_gate": (INTERMEDIATE, HIDDEN), "ffn_up": (INTERMEDIATE, HIDDEN)}
        parts |= {"ffn_down": (HIDDEN, INTERMEDIATE), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        if architecture == "gemma3":
            parts |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
        if architecture in ("qwen3", "gemma3"):
            parts |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
        if architecture == "qwen2":
            shapes |= {f"blk.{layer}.attn_{n}.bias": (h * head_dim,) for n, h in heads.items()}
    return {
        name: rng.standard_normal(shape).astype(np.float32) * (1.5 if len(shape) > 1 else 0.2) / HEADS**1.5
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def write_file(
    file: Path, architecture: str, kinds: dict[str, Kind], tokenizer: Path, **changes: Any
) -> dict[str, np.ndarray]:
    """Returns what the tensors stand for, by llama.cpp's names."""
    # Transformers takes that of qwen3 to be 128, whatever the file says.
    head_dim = 128 if architecture == "qwen3" else HEAD_DIM
    writer = gguf.GGUFWriter(file, architecture)
    for field, value in {
        "context_length": 256,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INTERMEDIATE,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "key_length": head_dim,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 10000.0,
        "rope_dimension_count": head_dim,
        "vocab_size": 512,
    }.items():
        getattr(writer, f"add_{field}")(value)
    write_vocabulary(writer, tokenizer)
    for name, value in changes.items():
        getattr(writer, name)(value)
    meaning = {}
    for name, tensor in tensors_of(architecture, head_dim).items():
        kind = next((kind for part, kind in kinds.items() if part in name and tensor.ndim > 1), Kind.F32)
        data = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        meaning[name] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())
    tokens = dict(model["model"]["vocab"])
    special = {entry["content"]: entry["id"] for entry in model["added_tokens"]}
    names = sorted(tokens | special, key=(tokens | special).get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if name in special else gguf.TokenType.NORMAL for name in names]
    )
    writer.add_token_merges(
        [" ".join(pair) if isinstance(pair, list) else pair for pair in model["model"]["merges"]]
    )
    writer.add_bos_token_id(special["<|im_start|>"])
    writer.add_eos_token_id(special["<|im_end|>"])


def load_with_transformers(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    )


def value_of(weight: TensorEntry | QuantizedLinear | ComputedWeight) -> np.ndarray:
    return weight.read() if isinstance(weight, TensorEntry) else weight.dequantize()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_weights_are_those_that_transformers_reads(
    tiny_tokenizer: Path, tmp_path: Path, architecture: str
) -> None:
    """In Hugging Face's order of rows, and with norms as the model's code wants them."""
    file = tmp_path / "model.gguf"
    write_file(file, architecture, KINDS, tiny_tokenizer)
    checkpoint = Checkpoint.open(str(file))
    expected = load_with_transformers(file).state_dict()
    found = {**checkpoint.tensors, **checkpoint.quantized}
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_allclose(value_of(weight), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert (checkpoint.dtype, checkpoint.quant_method) == ("bfloat16", "gguf")
    assert checkpoint.config.eos_token_id == 2


def test_what_is_kept_and_what_is_not(tiny_tokenizer: Path, tmp_path: Path) -> None:
    meaning = write_file(tmp_path / "model.gguf", "llama", KINDS, tiny_tokenizer)
    checkpoint = Checkpoint.open(str(tmp_path))
    layer = "model.layers.1"
    q, k, up = (
        checkpoint.quantized[f"{layer}.{name}_proj.weight"]
        for name in ("self_attn.q", "self_attn.k", "mlp.up")
    )
    assert isinstance(q, QuantizedLinear)
    assert isinstance(k, QuantizedLinear)
    assert isinstance(up, QuantizedLinear)
    assert [(each.format, each.group_size) for each in (q, k, up)] == [
        ("int8", 32),
        ("int4", 32),
        ("int4", 32),
    ]
    assert [each.has_float_zeros for each in (q, k, up)] == [False, False, True]
    # Rows of q and k are where the rotation of Hugging Face looks for them: halves instead of pairs.
    in_file = meaning["blk.1.attn_q.weight"].reshape(HEADS, HEAD_DIM // 2, 2, HIDDEN)
    np.testing.assert_array_equal(
        q.dequantize(), in_file.transpose(0, 2, 1, 3).reshape(HEADS * HEAD_DIM, HIDDEN)
    )
    down = checkpoint.quantized[f"{layer}.mlp.down_proj.weight"]
    assert isinstance(down, ComputedWeight)
    assert down.reason == "dequantized: Q5_1 is a format that is not kept"
    # What needs no change is read where it is.
    assert checkpoint.tensors[f"{layer}.self_attn.v_proj.weight"].dtype == "F16"
    assert checkpoint.tensors[f"{layer}.mlp.gate_proj.weight"].dtype == "BF16"


def check_logits(executor: Any, drive: Drive, file: Path, tolerance: float) -> None:
    logits = drive(executor).run([{"a": TEXT[:30]}, {"a": TEXT[30:]}])["a"]
    with torch.no_grad():
        expected = load_with_transformers(file)(torch.tensor([TEXT])).logits[0].numpy()
    assert np.linalg.norm(logits - expected) < tolerance * np.linalg.norm(expected)


def test_a_file_is_built_and_keeps_its_numbers(tiny_tokenizer: Path, tmp_path: Path, drive: Drive) -> None:
    """The tokenizer is in the file; ONNX Runtime reads the graph too."""
    file = tmp_path / "model.gguf"
    write_file(file, "llama", KINDS, tiny_tokenizer)
    result = build(BuildOptions(model=str(file), output=tmp_path / "repository", kv_cache_bytes=2**20))
    folder = result.folder / "1"
    assert result.manifest.dtype == "bfloat16"
    assert result.manifest.model.eos_token_ids == (2,)
    made = {choice.name.removeprefix("model.layers.0."): choice for choice in result.report.weights}
    assert sum(choice.is_quantized for choice in made.values()) == 4 * LAYERS + 1
    up, q = made["mlp.up_proj.weight"], made["self_attn.q_proj.weight"]
    assert (up.label, up.reason) == ("int4, groups of 32", "from the checkpoint (gguf, Q4_1)")
    # A float32 scale and zero point for each of 2 groups in 96 rows.
    assert up.bytes_after == INTERMEDIATE * HIDDEN // 2 + 2 * INTERMEDIATE * 2 * 4
    assert (q.label, q.bytes_after) == ("int8, groups of 32", 64 * 64 + 64 * 2 * 4)
    assert made["mlp.down_proj.weight"].reason == "dequantized: Q5_1 is a format that is not kept"
    check_logits(OpenVINOExecutor(folder, result.manifest, threads=2), drive, file, 0.03)
    check_logits(OnnxRuntimeModel(folder, result.manifest), drive, file, 0.02)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = "The quick brown fox, naïve"
    expected = AutoTokenizer.from_pretrained(tiny_tokenizer)(text, add_special_tokens=False)
    assert tokenizer(text, add_special_tokens=False).input_ids == expected.input_ids


def test_own_operators_take_what_they_can(
    tiny_tokenizer: Path, tmp_path: Path, make_manifest: MakeManifest, drive: Drive
) -> None:
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    file = tmp_path / "model.gguf"
    write_file(file, "llama", KINDS, tiny_tokenizer)
    exported = export_model(Checkpoint.open(str(file)), "float32", lowering="plugin")
    write_graph(exported, tmp_path / "graph")
    made = {choice.name.removeprefix("model.layers.0."): choice for choice in exported.weights}
    up, q = made["mlp.up_proj.weight"], made["self_attn.q_proj.weight"]
    assert up.reason == "dequantized: Int4Gemm has no zero points that are no whole numbers"
    assert q.reason == "dequantized: there is no operator for int8 weights"
    assert made["self_attn.k_proj.weight"].kind == "int4"
    manifest = make_manifest(exported.layers, vocab_size=512)
    check_logits(
        ReferenceExecutor(tmp_path / "graph", manifest, device=torch.device("cpu")), drive, file, 1e-4
    )


def test_what_is_beside_the_file_comes_first(tiny_tokenizer: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "model.gguf", "llama", {"": Kind.F16}, tiny_tokenizer)
    lone = Checkpoint.open(str(tmp_path / "model.gguf"))
    assert (lone.dtype, lone.quant_method) == ("float16", None)
    lone.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    lone.config.save_pretrained(tmp_path)
    assert Checkpoint.open(str(tmp_path)).config.rope_parameters["factor"] == 4.0
    assert Checkpoint.open(str(tmp_path / "model.gguf")).config.rope_parameters["rope_type"] == "default"
    assert Checkpoint.open(str(tmp_path)).tokenizer == tmp_path / "model.gguf"
    shutil.copy(tiny_tokenizer / "tokenizer.json", tmp_path)
    folder = Checkpoint.open(str(tmp_path))
    assert folder.tokenizer == tmp_path
    assert folder.content_key() != lone.content_key()
    write_tokenizer(folder.tokenizer, tmp_path / "tokenizer")
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match=r"2 GGUF files, give the path of one: model\.gguf, other\.gguf"):
        Checkpoint.open(str(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("llama", {"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "scales its rotary frequencies"),
        ("llama", {"add_uint32": None}, "is one of 3 parts of a model"),
        ("starcoder", {}, "transformers cannot read .*starcoder"),
        ("nemotron", {}, "GGUF files of 'nemotron' are not imported"),
    ],
)
def test_files_that_would_be_read_wrong_are_refused(
    tiny_tokenizer: Path, tmp_path: Path, architecture: str, changes: dict[str, Any], said: str
) -> None:
    file = tmp_path / "model.gguf"
    if "add_uint32" in changes:
        write_split(file, tiny_tokenizer)
    else:
        write_file(file, architecture, {}, tiny_tokenizer, **changes)
    with pytest.raises(ExportError, match=said):
        Checkpoint.open(str(file))


def write_split(file: Path, tokenizer: Path) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint16("split.count", 3)
    write_vocabulary(writer, tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_numbers_of_four_bits_are_not_rounded_once_more(tiny_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_file(file, "llama", KINDS, tiny_tokenizer)
    options = {"model": str(file), "output": tmp_path / "repository", "int4": True}
    with pytest.raises(ConfigError, match=r"is quantized already \(gguf\), and --int4 would round"):
        build(BuildOptions(**options))
    write_file(file, "llama", {"": Kind.F16}, tiny_tokenizer)
    with pytest.raises(ConfigError, match="calibration loads the model by transformers"):
        build(BuildOptions(**options, calibrate="awq"))
    checkpoint = Checkpoint.open(str(file))
    value = checkpoint.quantized["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(value, ComputedWeight)
    assert value.reason == "not quantized in the checkpoint"


def test_a_file_that_is_cut_off_or_none(tiny_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_file(file, "llama", KINDS, tiny_tokenizer)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="not a complete GGUF file"):
        Checkpoint.open(str(file))
    file.write_bytes(b"no GGUF at all, but long enough to be read")
    with pytest.raises(ConfigError, match="not a complete GGUF file"):
        Checkpoint.open(str(file))


def test_a_tensor_that_the_model_has_no_place_for(tiny_tokenizer: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS)
    write_file(tmp_path / "model.gguf", "llama", {}, tiny_tokenizer)
    config.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"has the tensor blk\.1\..*, for which llama has no place"):
        Checkpoint.open(str(tmp_path))

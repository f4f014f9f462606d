"""Checkpoints on disk: what is found in them, and what is refused before anything is traced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trtforge.builder.checkpoint import Checkpoint
from trtforge.errors import ConfigError, ExportError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_index_gives_every_tensor_its_bytes(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.config.model_type == "llama"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, entry in checkpoint.tensors.items():
        data = entry.file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        stored = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(entry.shape)
        assert torch.equal(stored, expected[name]), name


def test_content_key_follows_content_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    key = Checkpoint.open(str(folder)).content_key()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "README.md").write_text("about the model")
    assert Checkpoint.open(str(copy)).content_key() == key

    keys = {key}
    (copy / "tokenizer.json").write_text("{}")
    keys.add(Checkpoint.open(str(copy)).content_key())
    edit_config(copy, rms_norm_eps=1e-3)
    keys.add(Checkpoint.open(str(copy)).content_key())
    entry = Checkpoint.open(str(copy)).tensors["model.norm.weight"]
    with entry.file.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write(b"\x01")
    keys.add(Checkpoint.open(str(copy)).content_key())
    assert len(keys) == 4


def test_links_into_another_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    checkpoint = Checkpoint.open(str(links))
    assert all(entry.file.parent == folder for entry in checkpoint.tensors.values())


@pytest.mark.parametrize(
    ("model", "message"),
    [("/no/such/folder", "neither a folder nor a model id"), ("nobody/no-such-model", "cannot be")],
)
def test_a_model_that_is_nowhere(model: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        Checkpoint.open(model)


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        Checkpoint.open(str(folder))


def test_a_folder_without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        Checkpoint.open(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ExportError, match=r"pytorch_model\.bin.*convert"):
        Checkpoint.open(str(folder))


def test_a_file_that_was_cut_off(folder: Path) -> None:
    file = next(iter(folder.glob("*.safetensors")))
    data = file.read_bytes()
    for size in (4, 100, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ConfigError, match="not a complete safetensors file"):
            Checkpoint.open(str(folder))


def test_a_shard_that_is_missing(folder: Path) -> None:
    next(iter(folder.glob("*.safetensors"))).unlink()
    with pytest.raises(ConfigError, match="the checkpoint's index names it"):
        Checkpoint.open(str(folder))


def test_an_index_that_leads_out_of_the_folder(folder: Path) -> None:
    for name in ("../secret.safetensors", "/etc/passwd"):
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigError, match="not a file beside it"):
            Checkpoint.open(str(folder))


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": None},
        [],
    ],
)
def test_headers_that_lie(folder: Path, fields: object) -> None:
    text = json.dumps({"model.norm.weight": fields}).encode()
    for file in folder.glob("*.safetensors"):
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ConfigError, match="not a complete safetensors file"):
        Checkpoint.open(str(folder))


def test_quantization_that_only_a_side_file_tells(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(ExportError, match=r"quantized \(modelopt\), but has no such weights"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "something-new"])
def test_quantized_checkpoints_are_refused_by_name(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(ExportError, match=method):
        Checkpoint.open(str(folder))


def test_weights_of_unknown_dtype(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, file)
    with pytest.raises(ExportError, match="F8_E4M3"):
        Checkpoint.open(str(folder))


def test_model_types_that_transformers_does_not_know(folder: Path) -> None:
    edit_config(folder, model_type="brand-new")
    with pytest.raises(ExportError, match="brand-new"):
        Checkpoint.open(str(folder))
    edit_config(folder, auto_map={"AutoConfig": "modeling.BrandNewConfig"})
    (folder / "modeling.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ExportError, match="Python code, which is never run"):
        Checkpoint.open(str(folder))

"""The model's folder as Triton reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from trtforge import wire
from trtforge.builder.repository import check_model_name, install_triton_model
from trtforge.errors import ConfigError
from trtforge.manifest import KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo, Rank

LAYERS = (LayerCache(num_kv_heads=1, head_dim=8),)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        trtforge_version="0.0.0",
        build_key="key",
        runtime="fake",
        dtype="float32",
        model=ModelInfo(
            name="assistant", architecture="Fake", vocab_size=8, num_parameters=1, eos_token_ids=(1,)
        ),
        kv_cache=KVCacheLayout(dtype="float32", block_size=32, num_blocks=4, layers=LAYERS),
        limits=Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16),
        ranks=(Rank(onnx="rank0/model.onnx", kv_layers=LAYERS, logits_columns=(0, 8)),),
        files={"build.json": 3},
    )


def test_triton_config_names_every_tensor_of_the_wire(manifest: Manifest, tmp_path: Path) -> None:
    install_triton_model(tmp_path, manifest)
    config = text_format.Parse((tmp_path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("assistant", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [group.count for group in config.instance_group] == [1]
    data_type = model_config_pb2.DataType.Name
    inputs = {value.name: (data_type(value.data_type), value.optional) for value in config.input}
    assert inputs["text_input"] == ("TYPE_STRING", True)
    assert inputs["input_ids"] == ("TYPE_INT32", True)
    assert list(inputs) == [spec.name for spec in wire.REQUEST_TENSORS]
    assert [value.name for value in config.output] == [spec.name for spec in wire.RESPONSE_TENSORS]


def test_version_folder_has_model_py_and_manifest(manifest: Manifest, tmp_path: Path) -> None:
    install_triton_model(tmp_path, manifest)
    assert Manifest.load(tmp_path / "1") == manifest
    compile((tmp_path / "1" / "model.py").read_text(), "model.py", "exec")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a b", "a\n", "é", "a" * 129]
)
def test_names_that_are_no_plain_folder_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        check_model_name(name)


@pytest.mark.parametrize("name", ["llm", "SmolLM2-135M_Instruct.v2", "7b", "a" * 128])
def test_plain_names_pass(name: str) -> None:
    assert check_model_name(name) == name


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 2}')
    with pytest.raises(ConfigError, match="is not a manifest this version reads"):
        Manifest.load(tmp_path)
    with pytest.raises(ConfigError, match="build the model with build-engine first"):
        Manifest.load(tmp_path / "nowhere")

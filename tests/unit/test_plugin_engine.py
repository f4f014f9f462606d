"""A build for full TensorRT, up to TensorRT: it is not here, and its parser and builder are stood in for.

Creators and plugins are real, with TensorRT-RTX's classes, which are the same. They are called as TensorRT
calls them, for every node of the graph that it would get.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trtforge.builder import plan, plugin_graph, rank_engine
from trtforge.builder.build import BuildResult, build
from trtforge.builder.engine import EngineTarget, OnProgress
from trtforge.builder.engine_facts import EngineFacts
from trtforge.builder.options import BuildOptions
from trtforge.errors import ConfigError, EngineBuildError
from trtforge.manifest import Profile
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launch import Gpu, Plan
from trtforge.plugins.op import DOMAIN
from trtforge.runtime.executors.create import KERNELS_FOLDER

FOLDER = Path(__file__).parent
ENGINE = b"an engine"
BLOCK_SIZE = 16
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64
GPU = Gpu(90, 132)


@dataclass
class Parsed:
    """What TensorRT was given."""

    graph: onnx.ModelProto = field(default_factory=onnx.ModelProto)
    creators: dict[str, Any] = field(default_factory=dict)
    registered_first: bool = False
    profiles: Sequence[Profile] = ()


@dataclass
class Launcher:
    """What plugins load, and on which GPU."""

    gpu: Gpu = GPU
    loaded: list[Plan] = field(default_factory=list)

    def load(self, loaded: Plan) -> None:
        self.loaded.append(loaded)


def save_checkpoint(folder: Path, tokenizer: Path) -> None:
    """Experts, sinks and a window: an operator without kernels, an input behind ones that are left out."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=400,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=40,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, tiny_tokenizer)
    return folder


def options(checkpoint: Path, output: Path, **values: Any) -> BuildOptions:
    given = {"runtime": "tensorrt", "dtype": "bfloat16", "block_size": BLOCK_SIZE, "kv_cache_bytes": 2**20}
    return BuildOptions(model=str(checkpoint), output=output, gpus=("sm_90",), **given | values)


@pytest.fixture(scope="module", params=["auto", "fp8"])
def built(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tensorrt_rtx: ModuleType,
) -> tuple[BuildResult, Parsed]:
    """With a cache of the build's dtype, and of 8-bit floats."""
    parsed = Parsed()

    class Registry:
        def register_creator(self, creator: Any, namespace: str) -> bool:
            assert namespace == DOMAIN
            parsed.creators[creator.name] = creator
            return True

    class Network:
        def __init__(self, graph: bytes, path: Path, package: str) -> None:
            assert (path.name, package) == ("model.onnx", "tensorrt")
            parsed.graph = onnx.load_from_string(graph)
            parsed.registered_first = bool(parsed.creators)

        def build(
            self, target: EngineTarget, profiles: Sequence[Profile], on_progress: OnProgress
        ) -> memoryview:
            parsed.profiles = profiles
            return memoryview(ENGINE)

        def facts(self) -> EngineFacts:
            return EngineFacts(inputs=(), outputs=(), layers=())

    package = SimpleNamespace(
        **vars(tensorrt_rtx) | {"__name__": "tensorrt", "get_plugin_registry": Registry, "DimsExprs": list}
    )
    target = EngineTarget("tensorrt", "11.4", ("9.0",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose_target", lambda *arguments, **values: target)
        patch.setattr(plugin_graph, "load_package", lambda name: package)
        patch.setattr(rank_engine, "Network", Network)
        output = tmp_path_factory.mktemp("built") / "repository"
        result = build(options(checkpoint, output, kv_cache_dtype=request.param))
    return result, parsed


def custom_nodes(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in graph.graph.node if node.domain == DOMAIN]


def test_only_operators_with_kernels_stay_and_none_has_a_body(built: tuple[BuildResult, Parsed]) -> None:
    _, parsed = built
    assert parsed.registered_first
    assert Counter(node.op_type for node in custom_nodes(parsed.graph)) == {"PagedAttention": 2}
    assert {node.domain for node in parsed.graph.graph.node} == {"", DOMAIN}
    assert len(parsed.graph.functions) == 0
    assert [output.name for output in parsed.graph.graph.output] == [
        "logits",
        "kv_cache_out.0",
        "kv_cache_out.1",
    ]


def test_nodes_say_what_plugins_and_their_lookup_need(built: tuple[BuildResult, Parsed]) -> None:
    windows = []
    for layer, node in enumerate(custom_nodes(built[1].graph)):
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert values["plugin_namespace"] == DOMAIN.encode()
        assert values["plugin_version"] == b"1"
        assert values["input_names"].split(b",")[-1] == b"sinks"
        assert len(node.input) == len(values["input_names"].split(b",")) == 9
        assert "" not in node.input
        assert node.input[3] == f"kv_cache.{layer}"
        windows.append(values["window"])
    assert sorted(windows) == [0, 40]


def test_profiles_are_those_of_decode_and_of_every_step(built: tuple[BuildResult, Parsed]) -> None:
    result, parsed = built
    assert [profile.name for profile in parsed.profiles] == ["decode", "mixed"]
    assert result.manifest.ranks[0].engine.profiles == tuple(parsed.profiles)


def test_the_kernels_lie_beside_the_engine_and_are_recorded(built: tuple[BuildResult, Parsed]) -> None:
    result, _ = built
    manifest = result.manifest
    engine = manifest.ranks[0].engine
    assert (engine.package, engine.compute_capabilities) == ("tensorrt", ("9.0",))
    bundle = Bundle.load(result.folder / "1" / KERNELS_FOLDER)
    assert {entry.arch for entry in bundle.manifest.cubins} == {90}
    for file in ("manifest.json", *(entry.file for entry in bundle.manifest.cubins)):
        assert f"kernels/{file}" in manifest.files.keys() & manifest.sha256.keys()


def test_every_node_becomes_a_plugin_whose_kernels_are_in_the_bundle(
    built: tuple[BuildResult, Parsed], tensorrt_rtx: ModuleType
) -> None:
    result, parsed = built
    bundle = Bundle.load(result.folder / "1" / KERNELS_FOLDER)
    cache = "FP8" if result.manifest.kv_cache.dtype == "float8_e4m3fn" else "BF16"
    for node in custom_nodes(parsed.graph):
        creator = parsed.creators[node.op_type]
        launcher = Launcher()
        creator._launcher = lambda launcher=launcher: launcher
        fields, *memory = parsed_fields(tensorrt_rtx, creator, node)
        plugin = creator.create_plugin(node.name, fields, tensorrt_rtx.TensorRTPhase.BUILD)
        del memory
        assert plugin.num_outputs == len(node.output)
        assert plugin.get_aliased_input(1) == 3
        for num_tokens in (1, 5, 700):
            inputs = input_descs(tensorrt_rtx, node, num_tokens, cache)
            dtypes = [tensor.type for tensor in inputs]
            assert [dtype.name for dtype in plugin.get_output_data_types(dtypes)] == ["BF16", cache]
            plugin.on_shape_change(inputs, [])
        kernels = {launch.kernel for loaded in launcher.loaded for launch in loaded.launches}
        assert kernels
        for kernel in kernels:
            bundle.cubin(kernel, 90)


def parsed_fields(trt: ModuleType, creator: Any, node: onnx.NodeProto) -> tuple[Any, ...]:
    """Fields as the parser makes them: of the attributes that the creator names."""
    wanted = {field.name for field in creator.field_names}
    kinds: Mapping[int, tuple[str, Callable[[Any], Any]]] = {
        onnx.AttributeProto.STRING: ("CHAR", lambda value: np.frombuffer(value, np.int8)),
        onnx.AttributeProto.INT: ("INT32", lambda value: np.array([value], np.int32)),
        onnx.AttributeProto.FLOAT: ("FLOAT32", lambda value: np.array([value], np.float32)),
    }
    arrays, fields = [], []
    for attribute in node.attribute:
        if attribute.name in wanted:
            kind, convert = kinds[attribute.type]
            arrays.append(convert(onnx.helper.get_attribute_value(attribute)))
            fields.append(trt.PluginField(attribute.name, arrays[-1], getattr(trt.PluginFieldType, kind)))
    return trt.PluginFieldCollection(fields), arrays, fields


def input_descs(trt: ModuleType, node: onnx.NodeProto, num_tokens: int, cache_dtype: str) -> list[Any]:
    cache = (9, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    tensors = [
        ((num_tokens, HEADS, HEAD_DIM), "BF16"),
        *[((num_tokens, KV_HEADS, HEAD_DIM), "BF16")] * 2,
        (cache, cache_dtype),
        ((2, 4), "INT32"),
        ((3,), "INT32"),
        ((2,), "INT32"),
        ((num_tokens,), "INT32"),
        ((HEADS,), "BF16"),
    ]
    assert len(tensors) == len(node.input)
    descs = []
    for shape, dtype in tensors:
        desc = trt.PluginTensorDesc()
        desc.dims, desc.type = trt.Dims(shape), getattr(trt.DataType, dtype)
        desc.format = trt.TensorFormat.LINEAR
        descs.append(desc)
    return descs


# --------------------------------------------------------------------------- what is missing


def test_without_tensorrt_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=r"needs the package tensorrt,.*pip install 'trtforge\[tensorrt\]'"):
        build(options(tmp_path / "no model", tmp_path / "repository"))
    assert not (tmp_path / "repository").exists()


def test_attention_without_kernels_is_said_before_tensorrt_begins(
    export_tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = export_tiny_llama("bfloat16")
    with pytest.raises(
        EngineBuildError, match=r"kernels of the model's plugins: .* head_dim 16; it takes one of"
    ):
        plugin_graph.compile_kernels([folder / "model.onnx"], 32, ("9.0",), tmp_path / "kernels", print)


@pytest.mark.parametrize(
    ("gpus", "capability", "option", "said"),
    [
        (["sm_90"], "90", None, "('9.0',)"),
        ([], "89", "--kv-cache-dtype fp8", "('8.9',)"),
        ([], "86", "--kv-cache-dtype fp8", "--kv-cache-dtype fp8 is not possible for sm_86: GPUs have 8-bit"),
        (
            ["sm_90"],
            "89",
            None,
            "--gpu sm_90 is not possible with tensorrt 1.2.3, which builds for sm_89 here",
        ),
        (["sm_75"], "75", None, "no kernels are compiled for compute capability 7.5"),
    ],
)
def test_full_tensorrt_builds_for_the_gpu_of_this_machine(
    cuda_driver_folder: Path, tmp_path: Path, gpus: list[str], capability: str, option: str | None, said: str
) -> None:
    code = f"""
from trtforge.builder.engine import choose_target
from trtforge.errors import ConfigError
try:
    print(choose_target("tensorrt", {gpus}, fp8_option={option!r}).compute_capabilities)
except ConfigError as error:
    print(error)
"""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(cuda_driver_folder),
        "PYTHONPATH": os.pathsep.join([str(FOLDER / "fake_tensorrt" / "packages"), *sys.path]),
        "FAKE_CUDA_RECORD": str(tmp_path / "calls"),
        "FAKE_CUDA_ARCH": capability,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said in done.stdout

"""The whole build on a tiny random model: what appears in the repository, when, and when not."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import tokenizers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trtforge import cli, errors
from trtforge.builder.build import BuildResult, build
from trtforge.builder.engine_cache import default_cache_folder
from trtforge.builder.engine_facts import read_facts
from trtforge.builder.key import sources_digest
from trtforge.builder.options import BuildOptions, parse_cache_folder
from trtforge.builder.report import BuildReport
from trtforge.builder.verify import verify_graph
from trtforge.engine_file import EngineHost, check_engine
from trtforge.manifest import Manifest

KV_CACHE_BYTES = 2**20


@pytest.fixture(scope="module")
def checkpoint(make_random_llama: Callable[..., Path]) -> Path:
    """A random two-layer llama with a byte-level tokenizer."""
    folder = make_random_llama(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(folder)
    return folder


def options(model: Path, repository: Path, **values: object) -> BuildOptions:
    return BuildOptions(model=str(model), output=repository, kv_cache_bytes=KV_CACHE_BYTES, **values)


@pytest.fixture(scope="module")
def first_build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    return build(options(checkpoint, tmp_path_factory.mktemp("first") / "new" / "repository"))


@pytest.fixture
def built(first_build: BuildResult, tmp_path: Path) -> Path:
    """A repository of this test's own with the build in it."""
    return Path(shutil.copytree(first_build.folder.parent, tmp_path / "repository"))


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint without one of its weights, which only shows in the middle of a build."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identities(folder: Path) -> dict[Path, tuple[int, int]]:
    """What changes when a file or folder is replaced or written."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------- what a build makes


def test_build_makes_the_whole_folder_and_nothing_else(first_build: BuildResult) -> None:
    repository = first_build.folder.parent
    assert names(repository.parent) == ["repository"]
    assert names(repository) == ["llm"]
    assert names(first_build.folder) == ["1", "config.pbtxt"]
    version = first_build.folder / "1"
    assert names(version) == ["build.json", "manifest.json", "model.py", "rank0", "tokenizer"]
    assert {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= set(
        names(version / "tokenizer")
    )
    # Triton may run as somebody else than the builder.
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in first_build.folder.rglob("*"))
    assert not first_build.cached


def test_manifest_and_report_describe_the_model(first_build: BuildResult, checkpoint: Path) -> None:
    version = first_build.folder / "1"
    manifest = Manifest.load(version)
    assert manifest == first_build.manifest
    assert manifest.files.keys() == contents(version).keys() - {"manifest.json", "model.py"}
    assert manifest.sha256 == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in contents(version).items()
        if name.startswith(("rank0", "tokenizer"))
    }
    assert (manifest.runtime, manifest.dtype, manifest.limits.max_model_len) == ("openvino", "float32", 512)
    # Keys and values of 2 heads of 8 numbers of 4 bytes in 2 layers.
    assert manifest.kv_cache.bytes_per_token == 2 * 2 * 8 * 4 * 2
    assert manifest.kv_cache.num_blocks == KV_CACHE_BYTES // (32 * 256)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    assert manifest.model.num_parameters == model.num_parameters()
    assert manifest.model.eos_token_ids == (1,)
    report = BuildReport.load(version)
    assert report == first_build.report
    assert report.num_full_sequences == manifest.kv_cache.num_blocks // 16
    weights = onnx.load(version / "rank0" / "model.onnx", load_external_data=False).graph.initializer
    assert report.weight_bytes == sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in weights
    )
    assert [stage.name for stage in report.stages][:2] == ["open checkpoint", "hash checkpoint"]
    # What this process held before is in all of them.
    peaks = [stage.peak_memory_bytes for stage in report.stages if not stage.peak_is_cumulative]
    assert all(peak - min(peaks) < 2**29 for peak in peaks)


def test_tokenizer_in_the_repository_equals_the_checkpoints(
    first_build: BuildResult, checkpoint: Path
) -> None:
    text = "Grüße, 世界 \x00"
    saved = tokenizers.Tokenizer.from_file(str(first_build.folder / "1" / "tokenizer" / "tokenizer.json"))
    original = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert saved.encode(text).ids == original.encode(text).ids
    assert saved.decode(saved.encode(text).ids) == text


# --------------------------------------------------------------------------- what is there already


def test_the_same_build_is_a_cache_hit_wherever_the_checkpoint_lies(
    built: Path, checkpoint: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    before = identities(built)
    assert build(options(moved, built)).cached
    assert identities(built) == before
    assert names(tmp_path) == ["moved", "repository"]


def test_an_edited_config_is_kept_by_a_cache_hit(built: Path, checkpoint: Path) -> None:
    config = built / "llm" / "config.pbtxt"
    config.write_text(config.read_text() + "# edited\n")
    assert build(options(checkpoint, built)).cached
    assert config.read_text().endswith("# edited\n")


def test_another_build_is_refused_and_force_replaces_it(
    built: Path, checkpoint: Path, tmp_path: Path
) -> None:
    before = contents(built)
    with pytest.raises(errors.ConfigError, match="give --force"):
        build(options(checkpoint, built, max_num_seqs=3))
    assert contents(built) == before
    result = build(options(checkpoint, built, max_num_seqs=3, force=True))
    assert not result.cached
    assert Manifest.load(built / "llm" / "1").limits.max_num_seqs == 3
    assert names(tmp_path) == ["repository"]
    assert names(built) == ["llm"]


def test_one_changed_weight_makes_another_build(built: Path, checkpoint: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    with pytest.raises(errors.ConfigError, match="give --force"):
        build(options(changed, built))


def test_a_damaged_build_is_built_again(built: Path, checkpoint: Path, first_build: BuildResult) -> None:
    weights = built / "llm" / "1" / "rank0" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert not build(options(checkpoint, built)).cached
    assert weights.read_bytes() == (first_build.folder / "1" / "rank0" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_build_engine_did_not_make_is_never_replaced(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "llm"
    if kind == "folder":
        (target / "1").mkdir(parents=True)
        (target / "1" / "manifest.json").write_text('{"name": "somebody else\'s"}')
    elif kind == "file":
        target.write_text("precious")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(errors.ConfigError, match="was not made by build-engine"):
        build(options(checkpoint, tmp_path, force=True))
    assert names(tmp_path) == ["llm"]
    assert kind != "folder" or (target / "1" / "manifest.json").is_file()


def test_the_key_follows_the_builders_sources_only(tmp_path: Path) -> None:
    package = tmp_path / "trtforge"
    for name in (
        "builder/export.py",
        "runtime/scheduling/scheduler.py",
        "plugins/linear/op.py",
        "model_repository/model.py",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    for name in ("engine_options.py", "manifest.py", "wire.py"):
        (package / name).write_text("")
    digest = sources_digest(package)
    (package / "runtime" / "scheduler.py").write_text("x")
    assert sources_digest(package) == digest
    (package / "plugins" / "linear" / "op.py").write_text("x")
    assert sources_digest(package) != digest


# --------------------------------------------------------------------------- engines


def test_an_engine_lies_beside_its_graph_and_is_kept_for_the_next_build(
    checkpoint: Path, tmp_path: Path, tensorrt_rtx: ModuleType
) -> None:
    def build_as(name: str) -> BuildResult:
        values = {"runtime": "tensorrt-rtx", "dtype": "bfloat16", "gpus": ("sm_89",), "block_size": 16}
        return build(
            options(checkpoint, tmp_path / "repository", name=name, engine_cache=tmp_path / "cache", **values)
        )

    first = build_as("first")
    version = first.folder / "1"
    assert names(version / "rank0") == [
        "model.engine",
        "model.engine.json",
        "model.onnx",
        "model.safetensors",
    ]
    engine = first.manifest.ranks[0].engine
    assert (engine.package, engine.version) == ("tensorrt_rtx", tensorrt_rtx.__version__)
    assert engine.compute_capabilities == ("8.9",)
    assert first.report.engine_bytes == engine.size_bytes
    assert first.manifest.files["rank0/model.engine"] == engine.size_bytes
    host = EngineHost(engine.package, engine.version, "8.9")
    assert check_engine(version, Manifest.load(version), 0, host) == version / "rank0" / "model.engine"

    network = read_facts(version / "rank0" / "model.engine")
    layers = {(layers.type, layers.dtype): layers.count for layers in network.layers}
    assert layers["scatter", "bfloat16"] == len(first.manifest.kv_cache.layers)
    assert [tensor.name for tensor in network.inputs][-1] == "kv_cache.1"
    # TensorRT does not build the same bytes twice.
    assert build_as("second").manifest.ranks[0].engine == engine
    assert build_as("first").cached


def test_the_default_is_to_keep_engines_and_none_keeps_them_nowhere() -> None:
    assert parse_cache_folder(None) == default_cache_folder()
    assert parse_cache_folder("none") is None
    assert parse_cache_folder("some/where") == Path("some/where").resolve()


# --------------------------------------------------------------------------- failures


def test_a_build_that_fails_in_the_middle_leaves_nothing(
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["build-engine", str(broken), "--output", str(tmp_path / "repository")])
    with pytest.raises(SystemExit) as ended:
        cli.build_engine()
    assert ended.value.code == errors.ExportError.exit_code
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert names(tmp_path) == ["broken"]


def test_a_failed_replacement_leaves_the_old_build(built: Path, broken: Path, tmp_path: Path) -> None:
    before = contents(built)
    with pytest.raises(errors.ExportError):
        build(options(broken, built, force=True))
    assert contents(built) == before
    assert names(tmp_path) == ["broken", "repository"]


def test_a_kv_cache_too_small_for_one_sequence_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=f"needs {512 * 256} bytes"):
        build(BuildOptions(model=str(checkpoint), output=tmp_path / "repository", kv_cache_bytes=100_000))
    assert names(tmp_path) == []


def test_a_model_without_tokenizer_is_refused_before_its_export(checkpoint: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(checkpoint, mute, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    with pytest.raises(errors.EngineBuildError, match=r"tokenizer of .*mute cannot be read"):
        build(options(mute, tmp_path / "repository"))


def test_a_full_disk_is_seen_before_the_build(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(errors.CapacityError, match="1,048,576 bytes free"):
        build(options(checkpoint, tmp_path / "repository"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("output", ["/", "{tmp}/file", "{tmp}/file/repository"])
def test_places_that_cannot_hold_a_repository(output: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ConfigError, match=r"--output .* possible|--output / cannot"):
        build(options(checkpoint, Path(output.format(tmp=tmp_path))))


def test_graph_check_sees_short_weights_and_wrong_inputs(built: Path) -> None:
    graph = built / "llm" / "1" / "rank0" / "model.onnx"
    verify_graph(graph, 2)
    with pytest.raises(errors.EngineBuildError, match=r"missing=\['kv_cache.2'\]"):
        verify_graph(graph, 3)
    os.truncate(graph.with_name("model.safetensors"), 20_000)
    with pytest.raises(errors.EngineBuildError, match=r"of model\.safetensors, which has 20000 bytes"):
        verify_graph(graph, 2)
    model = onnx.load(graph, load_external_data=False)
    del model.graph.node[0]
    onnx.save(model, graph)
    with pytest.raises(errors.EngineBuildError, match="is not valid"):
        verify_graph(graph, 2)

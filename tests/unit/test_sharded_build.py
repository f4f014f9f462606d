"""Whole builds of several ranks: what each holds, what its engine is, and what is refused before any work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from rich.console import Console

from trtforge import wire
from trtforge.builder.build import BuildResult, build
from trtforge.builder.engine_facts import read_facts
from trtforge.builder.lower import lower
from trtforge.builder.options import BuildOptions
from trtforge.errors import CapacityError, ConfigError
from trtforge.manifest import LayerCache, Manifest
from trtforge.plugins.op import DOMAIN

VOCAB_SIZE = 450
HEAD_DIM = 16
RunTrtforge = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(make_random_llama: Callable[..., Path], tiny_tokenizer: Path) -> Path:
    """A random llama of three layers with 9 heads and 3 KV heads, as SmolLM2 has them."""
    folder = make_random_llama(
        vocab_size=VOCAB_SIZE,
        hidden_size=9 * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    shutil.copytree(tiny_tokenizer, folder, dirs_exist_ok=True)
    return folder


def options(model: Path, output: Path, **values: object) -> BuildOptions:
    return BuildOptions(model=str(model), output=output, kv_cache_bytes=2**20, **values)


def caches(num_layers: int, num_kv_heads: int) -> tuple[LayerCache, ...]:
    return (LayerCache(num_kv_heads=num_kv_heads, head_dim=HEAD_DIM),) * num_layers


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """Two stages of two ranks each, for the reference runtime."""
    repository = tmp_path_factory.mktemp("built") / "repository"
    return build(options(checkpoint, repository, runtime="reference", tp=2, pp=2))


def test_the_manifest_says_what_each_rank_has(built: BuildResult) -> None:
    manifest = Manifest.load(built.folder / "1")
    assert (manifest.tp_size, manifest.pp_size) == (2, 2)
    assert [rank.onnx for rank in manifest.ranks] == [f"rank{rank}/model.onnx" for rank in range(4)]
    assert [rank.kv_layers for rank in manifest.ranks] == [
        caches(2, 2),
        caches(2, 1),
        caches(1, 2),
        caches(1, 1),
    ]
    assert [rank.logits_columns for rank in manifest.ranks] == [(0, 0), (0, 0), (0, 225), (225, 450)]
    assert manifest.kv_cache.layers == caches(3, 3)
    assert {f"rank{rank}/model.{kind}" for rank in range(4) for kind in ("onnx", "safetensors")} < set(
        manifest.files
    )


def test_graphs_have_what_their_stage_begins_and_ends_with(built: BuildResult) -> None:
    for number, rank in enumerate(built.manifest.ranks):
        graph = onnx.load(built.folder / "1" / rank.onnx, load_external_data=False).graph
        is_first, is_last = number < 2, number >= 2
        dims = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in [*graph.input, *graph.output]
        }
        layers = range(len(rank.kv_layers))
        assert [value.name for value in graph.input] == [
            *wire.stage_inputs(is_first=is_first, is_last=is_last),
            *map(wire.kv_cache_input, layers),
        ]
        assert [value.name for value in graph.output] == [
            wire.stage_output(is_last=is_last),
            *map(wire.kv_cache_output, layers),
        ]
        start, stop = rank.logits_columns
        hidden = ["T", 9 * HEAD_DIM]
        assert dims.get(wire.HIDDEN_STATES, hidden) == dims.get(wire.HIDDEN_STATES_OUT, hidden) == hidden
        assert dims.get(wire.LOGITS, ["R", stop - start]) == ["R", stop - start]
        for layer, cache in enumerate(rank.kv_layers):
            shape = ["num_blocks", 2, "block_size", cache.num_kv_heads, HEAD_DIM]
            assert dims[wire.kv_cache_input(layer)] == dims[wire.kv_cache_output(layer)] == shape
        # One sum for the embedding of the first stage, and two for each layer.
        sums = [node for node in graph.node if (node.domain, node.op_type) == (DOMAIN, "AllReduce")]
        assert len(sums) == is_first + 2 * len(rank.kv_layers)


def test_the_table_says_what_ranks_hold(built: BuildResult) -> None:
    report = built.report
    assert [(rank.stage, rank.num_layers, rank.num_heads, rank.num_kv_heads) for rank in report.ranks] == [
        (0, 2, 6, 2),
        (0, 2, 3, 1),
        (1, 1, 6, 2),
        (1, 1, 3, 1),
    ]
    # Keys and values of each KV head in each layer, in four bytes a number.
    per_head = 2 * HEAD_DIM * 4
    assert [rank.kv_bytes_per_token for rank in report.ranks] == [
        4 * per_head,
        2 * per_head,
        2 * per_head,
        per_head,
    ]
    for number, rank in enumerate(report.ranks):
        file = built.folder / "1" / f"rank{number}" / "model.safetensors"
        assert rank.weight_bytes == pytest.approx(file.stat().st_size, rel=0.1)
    assert report.weight_bytes == sum(rank.weight_bytes for rank in report.ranks)
    # Embeddings are in two stages, norms on both ranks of a stage: little else is there twice.
    weight_bytes, embedding_bytes = 4 * report.num_parameters, 4 * VOCAB_SIZE * 9 * HEAD_DIM
    assert weight_bytes < report.weight_bytes < 1.02 * (weight_bytes + embedding_bytes)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(report.tables())
    assert "KV heads" in captured.get()


def test_other_commands_take_a_build_of_several_ranks(
    built: BuildResult, tmp_path: Path, run_trtforge: RunTrtforge
) -> None:
    status, output, _ = run_trtforge("inspect", built.folder)
    assert status == 0, output
    assert "rank3" in output
    picture = tmp_path / "layer.svg"
    status, _, errors = run_trtforge("inspect", built.folder, "--graph", picture, "--layer", "1")
    assert (status, picture.is_file()) == (0, True), errors
    status, _, errors = run_trtforge("check", built.folder)
    assert status == ConfigError.exit_code
    assert "has 4 ranks" in errors


def test_sums_become_collectives_of_tensorrt(built: BuildResult) -> None:
    lowered = lower(built.folder / "1" / built.manifest.ranks[1].onnx, block_size=32, tp_size=2)
    collectives = [node for node in lowered.graph if node.op_type == "DistCollective"]
    assert len(collectives) == 5
    assert not [node for node in lowered.graph if node.domain == DOMAIN]
    for node in collectives:
        assert node.domain == "trt"
        assert {name: attribute.value for name, attribute in node.attributes.items()} == {
            "collective_operation": "all_reduce",
            "reduce_op": "sum",
            "nb_rank": 2,
            "root": -1,
            "group_size": 0,
            "groups": (),
        }


def test_engines_of_all_ranks(checkpoint: Path, tmp_path: Path, tensorrt_rtx: ModuleType) -> None:
    values = {"runtime": "tensorrt-rtx", "dtype": "bfloat16", "gpus": ("sm_89",), "engine_cache": None}
    result = build(options(checkpoint, tmp_path / "repository", tp=2, **values))
    engines = [rank.engine for rank in result.manifest.ranks]
    assert [engine.file for engine in engines] == ["rank0/model.engine", "rank1/model.engine"]
    for engine, rank in zip(engines, result.report.ranks, strict=True):
        assert engine.size_bytes == (result.folder / "1" / engine.file).stat().st_size == rank.engine_bytes
        assert engine.size_bytes > 0.9 * rank.weight_bytes


def test_engines_of_stages_read_and_give_what_executors_bind(
    checkpoint: Path, tmp_path: Path, tensorrt_rtx: ModuleType
) -> None:
    values = {"runtime": "tensorrt-rtx", "dtype": "bfloat16", "gpus": ("sm_89",), "engine_cache": None}
    result = build(options(checkpoint, tmp_path / "repository", pp=2, **values))
    for number, rank in enumerate(result.manifest.ranks):
        network = read_facts(result.folder / "1" / rank.engine.file)
        is_first, is_last = number == 0, number == 1
        layers = range(len(rank.kv_layers))
        assert [tensor.name for tensor in network.inputs] == [
            *wire.stage_inputs(is_first=is_first, is_last=is_last),
            *map(wire.kv_cache_input, layers),
        ]
        assert [tensor.name for tensor in network.outputs] == [
            wire.stage_output(is_last=is_last),
            *map(wire.kv_cache_output, layers),
        ]
    first, last = (read_facts(result.folder / "1" / rank.engine.file) for rank in result.manifest.ranks)
    # The size of a row is known, so that there can be memory for it before a step.
    for handed in (first.outputs[0], last.inputs[0]):
        assert (handed.dtype, handed.dims[1]) == ("bfloat16", 9 * HEAD_DIM)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tp": 10}, "--tp 10 is more than the 9 attention heads"),
        ({"pp": 4}, "--pp 4 is more than the 3 layers"),
    ],
)
def test_more_ranks_than_parts_are_refused_before_any_work(
    values: dict[str, int], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        build(options(checkpoint, tmp_path / "repository", **values))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_of_two_stages_need_room_on_the_disk(
    is_tied: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied ones are in the checkpoint once."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": is_tied}))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))

    def needed_bytes(pp: int) -> int:
        with pytest.raises(CapacityError, match="the build needs") as error:
            build(options(model, tmp_path / "repository", pp=pp))
        return int(re.findall(r"needs ([\d,]+):", str(error.value))[0].replace(",", ""))

    embedding_bytes = 4 * VOCAB_SIZE * 9 * HEAD_DIM
    assert needed_bytes(pp=2) - needed_bytes(pp=1) == is_tied * embedding_bytes

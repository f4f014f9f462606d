"""The figures of a build, and what its stages are measured to take."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from rich.console import Console

from trtforge.builder.quantization.policy import WeightChoice
from trtforge.builder.report import BuildReport
from trtforge.builder.stages import StageRecord, Stages
from trtforge.manifest import KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo, Rank


@pytest.fixture
def report() -> BuildReport:
    """SmolLM2-135M with 1 GiB of KV cache."""
    layers = (LayerCache(num_kv_heads=3, head_dim=64),) * 30
    manifest = Manifest(
        trtforge_version="0.0.0",
        build_key="key",
        runtime="openvino",
        dtype="bfloat16",
        model=ModelInfo(
            name="llm",
            architecture="LlamaForCausalLM",
            vocab_size=49152,
            num_parameters=134_515_008,
            eos_token_ids=(2,),
        ),
        kv_cache=KVCacheLayout(
            dtype="bfloat16",
            block_size=32,
            num_blocks=1456,
            layers=layers,
        ),
        limits=Limits(max_model_len=2040, max_num_seqs=256, max_num_batched_tokens=2048),
        ranks=(Rank(onnx="rank0/model.onnx", kv_layers=layers, logits_columns=(0, 49152)),),
        files={},
    )
    stages = [
        StageRecord("export graph", 12.34, 700 * 2**20, False),
        StageRecord("check graph", 1, 2**30, False),
    ]
    return BuildReport.of(
        manifest,
        source="a/model",
        num_nodes=4321,
        num_heads=[9],
        weight_bytes=[269_030_016],
        weights=[()],
        stages=stages,
    )


def text_of(report: BuildReport) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(report.tables())
    return captured.get()


def test_figures_equal_hand_arithmetic(report: BuildReport) -> None:
    assert report.kv_bytes_per_token == 23040
    assert report.kv_cache_bytes == 1456 * 32 * 23040
    # 2,040 tokens take 64 blocks, the last one not full; 22 * 64 = 1,408 of 1,456 blocks.
    assert report.num_full_sequences == 22


def test_tables_show_every_figure(report: BuildReport) -> None:
    rows = {
        cells[0].strip(): cells[1].strip()
        for line in text_of(report).splitlines()
        if len(cells := line.strip("│┃ ").split("│")) > 1
    }
    assert rows == {
        "parameters": "134,515,008",
        "graph nodes": "4,321",
        "weights": "256.6 MiB",
        "KV cache per token": "22.5 KiB",
        "KV cache": "1,023.8 MiB",
        "KV blocks of 32 tokens": "1,456",
        "sequences of 2,040 tokens that fit": "22",
        "export graph": "12.3",
        "check graph": "1.0",
        "all": "13.3",
    }


def test_table_says_when_peaks_are_cumulative(report: BuildReport) -> None:
    assert "so far" not in text_of(report)
    stage = StageRecord("export graph", 1.0, 1, True)
    assert "peak memory so far" in text_of(report.model_copy(update={"stages": (stage,)}))


def test_json_round_trip(report: BuildReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert BuildReport.load(tmp_path) == report


def test_each_stage_has_its_own_peak_memory() -> None:
    with Stages() as stages:
        with stages.stage("large"):
            bytearray(b"x") * (300 * 2**20)
        with stages.stage("small"):
            pass
    large, small = stages.records
    assert (large.name, small.name) == ("large", "small")
    assert large.peak_memory_bytes > 300 * 2**20
    assert small.peak_is_cumulative or small.peak_memory_bytes < large.peak_memory_bytes - 200 * 2**20


def test_a_stage_that_fails_leaves_no_record(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Stages() as stages:
        with stages.stage("works") as stage:
            stage.describe("step")
            stage.on_progress(1, 2)
        with pytest.raises(ValueError, match="broken"), stages.stage("fails"):
            raise ValueError("broken")
    assert [record.name for record in stages.records] == ["works"]
    assert [message.split(":")[0] for message in caplog.messages] == ["works"]


def test_a_terminal_shows_progress_and_a_file_gets_no_control_codes() -> None:
    terminal = Console(force_terminal=True, width=100)
    with terminal.capture() as shown, Stages(terminal) as stages, stages.stage("export"):
        pass
    assert "export" in shown.get()
    plain = Console(force_terminal=False)
    with plain.capture() as shown, Stages(plain) as stages, stages.stage("export"):
        pass
    assert shown.get() == ""


def test_what_became_of_weights_is_counted_by_kind_and_reason(report: BuildReport) -> None:
    def choice(name: str, kind: str, group_size: int | None, reason: str) -> WeightChoice:
        return WeightChoice(
            name, (64, 64), kind, group_size, reason, 2**20, 2**20 if kind == "bfloat16" else 2**18
        )

    assert "rounded" not in text_of(report)
    weights = (
        choice("a", "int4", 64, "rounded"),
        choice("b", "bfloat16", None, "excluded"),
        choice("c", "int4", 64, "rounded"),
    )
    lines = text_of(report.model_copy(update={"weights": weights})).splitlines()
    (rounded,) = [line for line in lines if "rounded" in line]
    assert [cell.strip() for cell in rounded.split("│")[1:-1]] == [
        "int4, groups of 64",
        "2",
        "2.0 MiB",
        "512.0 KiB",
        "rounded",
    ]
    assert any("excluded" in line and "1.0 MiB" in line for line in lines)

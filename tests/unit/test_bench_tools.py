"""scripts/load_tools.py: figures out of perf_analyzer's times, and the table of all tools."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_tools.py"


@pytest.fixture(scope="module")
def load_tools() -> ModuleType:
    spec = importlib.util.spec_from_file_location("load_tools", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def write_export(path: Path) -> None:
    """Two requests, in ms: sent at 0 with responses at 100, 110, 130; at 50 with 250, 260, 290."""
    requests = [
        {"timestamp": start * 10**6, "response_timestamps": [time * 10**6 for time in times]}
        for start, times in ((0, [100, 110, 130]), (50, [250, 260, 290]))
    ]
    path.write_text(json.dumps({"experiments": [{"requests": requests}]}))


def test_figures_of_perf_analyzer(load_tools: ModuleType, tmp_path: Path) -> None:
    write_export(tmp_path / "export.json")
    row = load_tools.perf_analyzer_row(tmp_path / "export.json")
    assert row.requests_per_s == pytest.approx(2 / 0.29)
    assert row.tokens_per_s == pytest.approx(6 / 0.29)
    assert (row.tokens_each, row.ttft_mean, row.ttft_p50) == (3, 150, 150)
    assert (row.tpot_mean, row.e2el_mean) == (17.5, 185)
    assert row.gap_p99 == pytest.approx(29.7)  # of 10, 10, 20 and 30


def test_the_table_has_the_runs_in_order_and_leaves_out_tools_without_results(
    load_tools: ModuleType, tmp_path: Path
) -> None:
    for concurrency in ("16", "2"):
        (tmp_path / concurrency).mkdir()
        write_export(tmp_path / concurrency / "perf_analyzer.json")
    (tmp_path / "serve.log").touch()
    lines = list(load_tools.table(tmp_path))
    assert [line.split(";")[0].strip() for line in lines if "concurrency" in line] == [
        "concurrency 2", "concurrency 16",
    ]  # fmt: skip
    assert sum(line.startswith("| perf_analyzer") for line in lines) == 2
    assert not any("aiperf" in line for line in lines)


def test_input_repeats_and_has_the_lengths_asked_for(load_tools: ModuleType) -> None:
    data = load_tools.perf_analyzer_input(50, 7, 5, 3)
    assert data == load_tools.perf_analyzer_input(50, 7, 5, 3)
    assert len(data["data"]) == 3
    for request in data["data"]:
        assert request["input_ids"]["shape"] == [len(request["input_ids"]["content"])] == [7]
        assert max(request["input_ids"]["content"]) < 50
        assert request["max_tokens"] == [5]

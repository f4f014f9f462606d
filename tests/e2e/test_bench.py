"""`trtforge bench` against a real tritonserver with the fake executor."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtforge.client.triton_server import TritonServer

pytestmark = pytest.mark.e2e

BENCH = (sys.executable, "-m", "trtforge", "bench")


@pytest.fixture(scope="module")
def server(fake_repository: Path, triton_server: Callable[[Path], TritonServer]) -> TritonServer:
    return triton_server(fake_repository)


Bench = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def bench(server: TritonServer, tmp_path: Path) -> Bench:
    """`bench(*arguments)`: exit code, JSON report and standard error of a run against the server."""

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        file = tmp_path / "report.json"
        command = [*BENCH, "--url", server.grpc_url, "--json", str(file), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        return result.returncode, json.loads(file.read_text()), result.stderr

    return run


def test_counts_add_up(bench: Bench, server: TritonServer, tmp_path: Path) -> None:
    html = tmp_path / "report.html"
    status, report, _ = bench(
        *("--num-requests", "24", "--concurrency", "1,6", "--input-len", "5:40", "--output-len", "3:20"),
        *("--goodput", "ttft:60000 tpot:60000", "--metrics-url", server.metrics_url, "--html", str(html)),
    )
    assert status == 0
    assert [run["load"] for run in report["runs"]] == ["concurrency 1", "concurrency 6"]
    for run, peak in zip(report["runs"], (1, 6), strict=True):
        metrics, requests = run["metrics"], run["requests"]
        assert (metrics["num_requests"], metrics["num_succeeded"], metrics["num_good"]) == (24, 24, 24)
        assert metrics["peak_concurrency"] == peak
        # Without an end of sequence answers are as long as asked for.
        assert [r["num_output_tokens"] for r in requests] == [r["max_tokens"] for r in requests]
        assert metrics["num_output_tokens"] == sum(r["num_output_tokens"] for r in requests)
        assert metrics["num_input_tokens"] == sum(r["num_input_tokens"] for r in requests)
        assert all(5 <= r["num_input_tokens"] <= 40 for r in requests)
        assert all(0 < r["ttft_ms"] <= r["e2el_ms"] for r in requests)
        assert metrics["output_tokens_per_s"] == pytest.approx(
            metrics["num_output_tokens"] / metrics["duration_s"]
        )
        assert any(m["series"].startswith("trtforge_num_requests_running") for m in run["server_metrics"])
    lengths = [[(r["num_input_tokens"], r["max_tokens"]) for r in run["requests"]] for run in report["runs"]]
    assert lengths[0] == lengths[1]
    ET.fromstring(html.read_text().removeprefix("<!DOCTYPE html>\n"))


def test_the_same_seed_sends_the_same_requests_at_the_same_times(bench: Bench) -> None:
    arguments = ("--num-requests", "12", "--request-rate", "50", "--burstiness", "0.5", "--warmup", "0")
    arguments += ("--input-len", "5:40", "--output-len", "2:9")
    keys = ("index", "scheduled_s", "num_input_tokens", "num_output_tokens", "max_tokens")

    def requests(seed: str) -> list[list[Any]]:
        status, report, _ = bench(*arguments, "--seed", seed)
        assert status == 0
        (run,) = report["runs"]
        assert all(request["sent_s"] >= request["scheduled_s"] for request in run["requests"])
        return [[request[key] for key in keys] for request in run["requests"]]

    first = requests("5")
    assert first == requests("5")
    assert first != requests("6")


def test_failures_are_counted_by_kind_and_leave_others_alone(bench: Bench, tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "fine", "max_tokens": 4}, {"input_ids": [1] * 600}, {"input_ids": [10**6]}]
    rows.append({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
    dataset.write_text("\n".join(map(json.dumps, rows)))
    status, report, errors = bench("--dataset", str(dataset), "--num-requests", "8", "--warmup", "0")
    assert status == 8
    assert "4 of 8 requests failed" in errors
    metrics = report["runs"][0]["metrics"]
    assert metrics["failures"] == {"request": 4}
    assert (metrics["num_succeeded"], metrics["num_output_tokens"]) == (4, 16)


def test_a_warm_up_that_is_refused_ends_the_command(server: TritonServer) -> None:
    command = [*BENCH, "--url", server.grpc_url, "--input-len", "600"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 7
    assert "600 tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--url", "127.0.0.1:1"), 8, "127.0.0.1:1"),
        (("--concurrency", "2", "--request-rate", "1"), 2, "exclude"),
        (("--json", "no-such-folder/report.json"), 2, "no-such-folder"),
        (("--goodput", "speed:1"), 2, "speed:1"),
    ],
)
def test_what_cannot_work_is_said_before_the_run(
    arguments: tuple[str, ...], status: int, message: str
) -> None:
    result = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == status
    assert message in result.stderr


def test_ctrl_c_reports_what_there_is(
    make_fake_repository: Callable[..., Path], triton_server: Callable[[Path], TritonServer], tmp_path: Path
) -> None:
    server = triton_server(make_fake_repository(max_model_len=8192, num_blocks=2048))
    file = tmp_path / "report.json"
    command = [*BENCH, "--url", server.grpc_url, "--json", str(file), "--num-requests", "5000"]
    command += ["--concurrency", "4,8", "--output-len", "1:200"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "concurrency 4: sending 5000 requests\n"
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    (run,) = json.loads(file.read_text())["runs"]
    metrics = run["metrics"]
    assert 0 < metrics["num_succeeded"] < 5000
    assert 1 <= metrics["num_interrupted"] <= 4
    assert metrics["failures"] == {}
    assert len(run["requests"]) == metrics["num_requests"]

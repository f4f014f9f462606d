"""Metrics and log lines of a real tritonserver, with the fake executor behind it."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from trtforge.client.streaming import Client, RequestOptions, SamplingOptions
from trtforge.client.triton_server import Ports, TritonServer
from trtforge.errors import RequestError, RequestTimeoutError, ServerError

pytestmark = pytest.mark.e2e

TIMEOUT_S = 60
PUBLISHED_AFTER_S = 1.5
MAX_MODEL_LEN = 128 * 1024
SECRET = "The walrus and the carpenter"
ANY_FREE_PORTS = Ports(http=0, grpc=0, metrics=0)

FindEngines = Callable[..., list[psutil.Process]]
Metrics = defaultdict[str, float]  # of a series: name{label="value"}, without the model's label


@pytest.fixture(scope="module")
def repository(make_fake_repository: Callable[..., Path]) -> Path:
    return make_fake_repository(num_blocks=MAX_MODEL_LEN // 16, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.log"


@pytest.fixture(scope="module")
def server(repository: Path, log_file: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, ports=ANY_FREE_PORTS, log_file=log_file, exit_timeout_s=5.0) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


def scrape(server: TritonServer) -> Metrics:
    text = urllib.request.urlopen(server.metrics_url, timeout=TIMEOUT_S).read().decode()
    metrics: Metrics = defaultdict(float)
    for name, labels, value in re.findall(r"^trtforge_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        others = [label for label in labels.split(",") if label != 'model="llm"']
        assert len(others) < labels.count("=")
        metrics[name + ("{" + ",".join(others) + "}" if others else "")] = float(value)
    return metrics


def num_ended(metrics: Metrics) -> float:
    names = ("request_success_total", "request_failed_total", "request_cancelled_total")
    return sum(value for name, value in metrics.items() if name.startswith(names))


def scrape_after(server: TritonServer, num_requests: float) -> Metrics:
    """The metrics when so many requests have ended since the server's start and nothing is running."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        metrics = scrape(server)
        is_idle = metrics["num_requests_running"] + metrics["num_requests_waiting"] == 0
        if num_ended(metrics) == num_requests and is_idle and metrics["engine_ready"] == 1:
            time.sleep(PUBLISHED_AFTER_S)  # a scrape in the middle of publishing sees only a part
            return scrape(server)
        time.sleep(0.1)
    raise AssertionError(f"{num_ended(metrics)} of {num_requests} requests have ended: {metrics}")


def growth(before: Metrics, after: Metrics) -> Metrics:
    return defaultdict(float, {name: value - before[name] for name, value in after.items()})


def request_lines(log_file: Path) -> list[dict[str, Any]]:
    lines = [line for line in log_file.read_text().splitlines() if line.startswith('{"time"')]
    return [json.loads(line) for line in lines]


@pytest.fixture
def before(server: TritonServer) -> Metrics:
    """The metrics of the idle server, when those of earlier requests are published."""
    time.sleep(PUBLISHED_AFTER_S)
    return scrape(server)


def test_counts_are_exact(server: TritonServer, client: Client, before: Metrics) -> None:
    prompt = list(range(3, 43))  # two full blocks of 16 and a half
    whole = client.generate(input_ids=prompt, sampling=SamplingOptions(max_tokens=8))
    same_prefix = [*prompt[:32], 100, 101]
    chunks = list(client.stream(input_ids=same_prefix, sampling=SamplingOptions(max_tokens=5)))
    assert sum(len(chunk.token_ids) for chunk in chunks) == 5
    stop = whole.token_ids[3]
    num_until_stop = whole.token_ids.index(stop) + 1
    stopped = client.generate(
        input_ids=prompt, sampling=SamplingOptions(max_tokens=8, stop_token_ids=(stop,))
    )
    assert (stopped.finish_reason, len(stopped.token_ids)) == ("stop", num_until_stop)
    client.generate(
        input_ids=[200, 201, 202], sampling=SamplingOptions(max_tokens=6, n=2, temperature=1.0, seed=1)
    )
    with pytest.raises(RequestError):
        client.generate("Hello", sampling=SamplingOptions(max_tokens=-1))

    after = scrape_after(server, num_ended(before) + 5)
    delta = growth(before, after)
    num_prompt = 40 + 34 + 40 + 3
    num_generated = 8 + 5 + num_until_stop + 2 * 6
    assert delta["prompt_tokens_total"] == delta["request_prompt_tokens_sum"] == num_prompt
    assert delta["generation_tokens_total"] == delta["request_generation_tokens_sum"] == num_generated
    assert delta['request_success_total{finished_reason="length"}'] == 3
    assert delta['request_success_total{finished_reason="stop"}'] == 1
    assert delta['request_failed_total{kind="request"}'] == 1
    assert delta["inter_token_latency_seconds_count"] == num_generated - 5  # of five answers the first token
    for name in (
        *("time_to_first_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "e2e_request_latency_seconds"),
        *("request_prompt_tokens", "request_generation_tokens"),
    ):
        assert delta[f"{name}_count"] == 4, name
    # Each request took as long as its parts.
    assert delta["e2e_request_latency_seconds_sum"] == pytest.approx(
        delta["time_to_first_token_seconds_sum"] + delta["request_decode_time_seconds_sum"]
    )
    assert delta["inter_token_latency_seconds_sum"] <= delta["e2e_request_latency_seconds_sum"] * 2
    assert delta["prefix_cache_queries_total"] == num_prompt
    assert delta["prefix_cache_hits_total"] == 2 * 32
    # An answer's last token is never computed.
    assert delta["iteration_tokens_total_sum"] == num_prompt - 2 * 32 + num_generated - 5
    num_steps = delta["iteration_tokens_total_count"]
    assert 0 < num_steps == delta["step_duration_seconds_count"] == delta["executor_duration_seconds_count"]
    assert delta["executor_duration_seconds_sum"] < delta["step_duration_seconds_sum"]
    assert (after["kv_cache_usage_perc"], after["kv_cache_free_blocks"]) == (0, MAX_MODEL_LEN // 16)


def test_buckets_are_those_of_a_histogram(before: Metrics) -> None:
    buckets: dict[str, dict[float, float]] = defaultdict(dict)
    for series, value in before.items():
        if match := re.fullmatch(r'(\w+)_bucket\{le="(\S+)"\}', series):
            buckets[match[1]][float(match[2])] = value
    assert len(buckets) == 12
    for name, by_end in buckets.items():
        values = [by_end[end] for end in sorted(by_end)]
        assert values == sorted(values)
        assert by_end[float("inf")] == before[f"{name}_count"]


def test_cancelled_and_late_requests(
    server: TritonServer, client: Client, before: Metrics, log_file: Path
) -> None:
    num_lines = len(request_lines(log_file))
    endless = SamplingOptions(max_tokens=MAX_MODEL_LEN)
    stream = client.stream("Hello", sampling=endless)
    next(stream)
    deadline = time.monotonic() + TIMEOUT_S
    while scrape(server)["num_requests_running"] != 1 or scrape(server)["kv_cache_usage_perc"] == 0:
        assert time.monotonic() < deadline
    stream.close()
    with pytest.raises(RequestTimeoutError):
        client.generate("Hello", sampling=endless, options=RequestOptions(timeout_ms=300))
    after = scrape_after(server, num_ended(before) + 2)
    delta = growth(before, after)
    assert delta["request_cancelled_total"] == 1
    assert delta['request_failed_total{kind="timeout"}'] == 1
    assert delta["time_to_first_token_seconds_count"] == 2
    assert delta["e2e_request_latency_seconds_count"] == 0
    assert (after["kv_cache_usage_perc"], after["kv_cache_free_blocks"]) == (0, MAX_MODEL_LEN // 16)
    cancelled, late = request_lines(log_file)[num_lines:]
    assert (cancelled["finish_reason"], late["error_kind"]) == ("cancelled", "timeout")
    assert cancelled["generated_tokens"] + late["generated_tokens"] == delta["generation_tokens_total"]


def test_a_finished_request_is_one_line_without_its_text(
    server: TritonServer, client: Client, before: Metrics, log_file: Path
) -> None:
    num_lines = len(request_lines(log_file))
    for _ in range(2):
        client.generate(SECRET * 3, sampling=SamplingOptions(max_tokens=4), request_id="client's own")
    with pytest.raises(RequestError):
        client.generate(SECRET, sampling=SamplingOptions(max_tokens=-1), request_id="wrong")
    scrape_after(server, num_ended(before) + 3)
    first, second, refused = request_lines(log_file)[num_lines:]
    assert first["client_id"] == second["client_id"] == "client's own"
    assert first["request_id"] != second["request_id"]
    assert (first["finish_reason"], first["generated_tokens"], first["cached_tokens"]) == ("length", 4, 0)
    assert second["prompt_tokens"] == first["prompt_tokens"] > second["cached_tokens"] >= 16
    assert 0 <= first["queue_ms"] <= first["ttft_ms"] <= first["e2e_ms"]
    assert (refused["client_id"], refused["finish_reason"]) == ("wrong", "error")
    assert refused["error_kind"] == "request"
    assert SECRET[:8] not in log_file.read_text()


def test_responses_carry_the_clients_id(server: TritonServer) -> None:
    ids = []
    done = threading.Event()

    def take(result: triton.InferResult, error: Exception | None) -> None:
        response = result.get_response()
        ids.append(response.id)
        if response.parameters["triton_final_response"].bool_param:
            done.set()

    prompt = triton.InferInput("input_ids", [3], "INT32")
    prompt.set_data_from_numpy(np.array([1, 2, 3], np.int32))
    with triton.InferenceServerClient(server.grpc_url) as stub:
        stub.start_stream(take)
        stub.async_stream_infer("llm", [prompt], request_id="client's own")
        assert done.wait(TIMEOUT_S)
    assert set(ids) == {"client's own"}


def test_counters_survive_a_killed_engine(
    server: TritonServer, client: Client, repository: Path, before: Metrics, find_engines: FindEngines
) -> None:
    stream = client.stream("Hello", sampling=SamplingOptions(max_tokens=MAX_MODEL_LEN))
    next(stream)
    time.sleep(PUBLISHED_AFTER_S)
    (engine,) = find_engines(repository)
    engine.kill()
    with pytest.raises(ServerError):
        list(stream)
    middle = scrape_after(server, num_ended(before) + 1)
    for series, value in growth(before, middle).items():
        if "total" in series or "seconds" in series:
            assert value >= 0, series
    assert growth(before, middle)["engine_restarts_total"] == 1
    assert growth(before, middle)['request_failed_total{kind="server"}'] == 1
    assert middle["kv_cache_usage_perc"] == 0
    for _ in range(2):
        client.generate(input_ids=list(range(3, 43)), sampling=SamplingOptions(max_tokens=2))
    delta = growth(middle, scrape_after(server, num_ended(middle) + 2))
    assert delta["prefix_cache_queries_total"] == 80
    assert delta["prefix_cache_hits_total"] == 32
    assert delta["generation_tokens_total"] == 4

"""Instruments and the record of one request; tests/e2e/test_metrics.py has them on a real server."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError
from trtforge.manifest import Limits
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.observability.metrics import EngineSum, Histogram, Metrics
from trtforge.runtime.observability.request_log import request_line
from trtforge.runtime.observability.request_record import RequestRecord
from trtforge.runtime.observability.tracing import phases_ns
from trtforge.runtime.outputs import EngineStats, GenerationOutput, RequestStart
from trtforge.runtime.request import EngineRequest, SamplingParams

BUCKETS = (0.5, 1.0, 4.0)


def output(*token_ids: int, index: int = 0, reason: str | None = None, **fields: object) -> GenerationOutput:
    return GenerationOutput("1", "", token_ids, reason, 7, 0, index, reason is not None, **fields)  # type: ignore[arg-type]


def by_name(histogram: Histogram) -> dict[str, float]:
    names = [series.labels.get("le") or series.name.split("_")[-1] for series in histogram.series()]
    return dict(zip(names, histogram.values(), strict=True))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def record(metrics: Metrics) -> RequestRecord:
    return RequestRecord(metrics, "1", "theirs")


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0, 3.9, 4.0, 9.0]), st.integers(1, 3))))
def test_buckets_hold_what_is_at_most_their_end(observed: list[tuple[float, int]]) -> None:
    histogram = Histogram("x", "", BUCKETS)
    for value, count in observed:
        histogram.observe(value, count)
    values = [value for value, count in observed for _ in range(count)]
    found = by_name(histogram)
    for end in BUCKETS:
        assert found[f"{end:g}"] == sum(value <= end for value in values)
    assert found["+Inf"] == found["count"] == len(values)
    assert found["sum"] == pytest.approx(sum(values))


@given(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=5))
def test_sums_go_on_when_the_engine_begins_again(engines: list[list[int]]) -> None:
    counter = EngineSum("x", "")
    expected = 0
    for growths in engines:
        total = 0
        counter.follow(0)  # what a new engine says when it has started
        for growth in growths:
            total += growth
            expected += growth
            counter.follow(total)
            assert counter.value == expected


def test_a_step_is_only_counted_if_one_was_run(metrics: Metrics) -> None:
    metrics.observe_step(EngineStats(num_blocks=8, num_free_blocks=8))
    metrics.observe_step(EngineStats(step_s=0.5, executor_s=0.25, schedule_s=0.0, num_batched_tokens=3))
    assert by_name(metrics.step_time)["count"] == 1
    assert by_name(metrics.executor_time)["sum"] == 0.25
    assert by_name(metrics.step_tokens)["sum"] == 3


def test_the_core_tells_of_each_step_once(metrics: Metrics) -> None:
    limits = Limits(max_model_len=32, max_num_seqs=4, max_num_batched_tokens=32)
    options = EngineOptions(overlap_scheduling=False)
    core = EngineCore(FakeExecutor(11, num_blocks=8, block_size=4), limits, (), 11, options)
    core.add_request(EngineRequest("1", (1, 2, 3), SamplingParams(max_tokens=20)))
    for _ in range(3):
        core.step()
        metrics.observe_step(core.stats)
    core.cancel("1")
    while core.has_work():
        core.step()  # only gives out the end of the request
        metrics.observe_step(core.stats)
    core.close()
    assert by_name(metrics.step_tokens)["sum"] == 3 + 1 + 1


def test_a_dead_engine_has_no_load(metrics: Metrics) -> None:
    stats = EngineStats(num_running=2, num_waiting=1, num_blocks=8, num_free_blocks=2)
    metrics.observe_load(stats, is_ready=True, num_restarts=0)
    assert (metrics.kv_cache_usage.value, metrics.num_running.value) == (0.75, 2)
    metrics.observe_load(stats, is_ready=False, num_restarts=0)
    assert (metrics.kv_cache_usage.value, metrics.num_running.value, metrics.engine_ready.value) == (0, 0, 0)


def test_tokens_that_come_together_share_the_time_before_them(
    metrics: Metrics, record: RequestRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((record.arrival_s + 1.0, record.arrival_s + 1.24, record.arrival_s + 1.3))
    monkeypatch.setattr("trtforge.runtime.observability.request_record.time.monotonic", lambda: next(times))
    assert not record.observe(output(1, start=RequestStart(queue_s=0.25, num_cached_tokens=0)))
    assert not record.observe(output(2, 3, 4))
    assert record.observe(output(5, reason="length"))
    latency = by_name(metrics.inter_token_latency)
    assert latency["count"] == 4
    assert latency["sum"] == pytest.approx(0.3)
    # Three of 80 ms and one of 60 ms.
    assert (latency["0.05"], latency["0.075"], latency["0.1"]) == (0, 1, 4)
    assert by_name(metrics.time_to_first_token)["sum"] == pytest.approx(1.0)
    assert by_name(metrics.queue_time)["sum"] == pytest.approx(0.25)
    assert by_name(metrics.prefill_time)["sum"] == pytest.approx(0.75)
    record.count_end()
    assert by_name(metrics.decode_time)["sum"] == pytest.approx(0.3)
    assert by_name(metrics.e2e_latency)["sum"] == pytest.approx(1.3)
    # The phases of its trace follow each other without gaps.
    (queue, prefill, decode) = phases_ns(record)
    assert queue[1] == record.arrival_unix_ns
    assert (queue[2], prefill[2]) == (prefill[1], decode[1])
    assert decode[2] - queue[1] == pytest.approx(1.3e9, rel=1e-6)


def test_answers_have_latencies_of_their_own_and_are_one_request(
    metrics: Metrics, record: RequestRecord
) -> None:
    record.observe(output(1, start=RequestStart(0.0, 0)))
    record.observe(output(1, index=1))
    record.observe(output(2, index=1))
    record.observe(output(2, reason="stop"))
    record.count_end()
    assert by_name(metrics.inter_token_latency)["count"] == 2
    assert by_name(metrics.time_to_first_token)["count"] == 1
    assert by_name(metrics.request_generation_tokens)["sum"] == 4
    assert metrics.generation_tokens.value == 4
    assert metrics.success["stop"].value == 1


def test_how_a_request_ends_is_counted_once(metrics: Metrics) -> None:
    ends = [
        output(reason="cancelled"),
        output(reason="error", error_kind="timeout"),
        output(1, reason="length", start=RequestStart(0.0, 0)),
    ]
    for last in ends:
        record = RequestRecord(metrics, "1", "")
        assert record.observe(last)
        record.count_end()
    refused = RequestRecord(metrics, "1", "")
    refused.refuse(CapacityError("full"))
    refused.count_end()
    # The adapter cancels what it cannot send. That is not the client's doing.
    unsendable = RequestRecord(metrics, "1", "")
    unsendable.is_undeliverable = True
    unsendable.observe(output(reason="cancelled"))
    unsendable.count_end()
    assert metrics.cancelled.value == 1
    assert {kind: counter.value for kind, counter in metrics.failed.items()} == {
        "request": 0,
        "capacity": 1,
        "timeout": 1,
        "server": 1,
    }
    assert {reason: counter.value for reason, counter in metrics.success.items()} == {"stop": 0, "length": 1}
    assert by_name(metrics.e2e_latency)["count"] == 1


def test_a_log_line_leaves_out_what_is_not_known(metrics: Metrics) -> None:
    record = RequestRecord(metrics, "1", 'theirs "quoted"\n')
    record.refuse(ValueError("the text of a prompt"))
    assert record.end_s is not None
    line = request_line(record, record.end_s)
    fields = json.loads(line)
    assert "\n" not in line
    assert "prompt" not in line
    assert fields.pop("e2e_ms") >= 0
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "event": "request",
        "request_id": "1",
        "client_id": 'theirs "quoted"\n',
        "finish_reason": "error",
        "error_kind": "server",
        "generated_tokens": 0,
    }

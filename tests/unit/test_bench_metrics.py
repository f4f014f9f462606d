"""The figures of a load test, on examples that are worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.client.bench.metrics import (
    Objectives,
    Summary,
    compute_metrics,
    concurrency_steps,
    peak_concurrency,
)
from trtforge.client.bench.records import RequestRecord, TokenChunk, token_gaps_s
from trtforge.client.bench.server_metrics import compare, parse_metrics
from trtforge.errors import ConfigError


def record(
    *chunks: tuple[float, int],
    sent_s: float = 0.0,
    end_s: float | None = None,
    error: str | None = None,
    scheduled_s: float | None = None,
) -> RequestRecord:
    """A request of ten tokens whose chunks came at the given times."""
    return RequestRecord(
        index=0,
        scheduled_s=scheduled_s,
        sent_s=sent_s,
        end_s=chunks[-1][0] if end_s is None else end_s,
        chunks=tuple(TokenChunk(*chunk) for chunk in chunks),
        num_input_tokens=10,
        max_tokens=sum(number for _, number in chunks),
        error=error,
        message="a reason" if error else "",
    )


# --------------------------------------------------------------------------- one request


def test_latencies_of_a_request() -> None:
    request = record((1.5, 1), (1.6, 1), (1.9, 2), sent_s=1.0)
    assert request.ttft_s == pytest.approx(0.5)
    assert request.e2el_s == pytest.approx(0.9)
    assert request.tpot_s == pytest.approx(0.4 / 3)
    # The two tokens that came together share the 0.3 s since the one before.
    assert request.itls_s == pytest.approx([0.1, 0.15, 0.15])


def test_tokens_of_the_first_chunk_have_no_gap_to_share() -> None:
    assert token_gaps_s([TokenChunk(2.0, 3), TokenChunk(2.4, 1)]) == pytest.approx([0, 0, 0.4])


def test_one_token_has_no_tpot_and_none_has_no_ttft() -> None:
    assert record((1.0, 1)).tpot_s is None
    assert record((1.0, 1)).itls_s == []
    assert record(end_s=1.0, error="server").ttft_s is None
    assert record(end_s=1.0, error="server").itls_s == []


def test_the_end_may_come_after_the_last_token() -> None:
    request = record((1.0, 1), (2.0, 1), end_s=2.5)
    assert request.e2el_s == 2.5
    assert request.tpot_s == 1.5
    assert request.itls_s == [1.0]


@given(
    st.lists(st.tuples(st.floats(0, 10, allow_subnormal=False), st.integers(1, 9)), min_size=1, max_size=30)
)
def test_gaps_add_up_to_the_time_between_first_and_last_token(chunks: list[tuple[float, int]]) -> None:
    times = itertools.accumulate(gap for gap, _ in chunks)
    made = [TokenChunk(time, number) for time, (_, number) in zip(times, chunks, strict=True)]
    gaps = token_gaps_s(made)
    assert len(gaps) == sum(chunk.num_tokens for chunk in made) - 1
    assert sum(gaps) == pytest.approx(made[-1].arrival_s - made[0].arrival_s)
    assert all(gap >= 0 for gap in gaps)


# --------------------------------------------------------------------------- many


def test_percentiles_between_ranks() -> None:
    summary = Summary.of([10.0, 20.0, 30.0, 40.0, 100.0])
    # 90 % of the way through 4 gaps is 3.6: 40 and six tenths of the 60 to 100; likewise 3.96.
    assert summary == Summary(
        mean=40.0, p50=30.0, p90=pytest.approx(76.0), p99=pytest.approx(97.6), max=100.0
    )
    assert Summary.of([]) is None


def test_figures_of_a_run() -> None:
    records = [
        record((0.2, 1), (1.0, 3), sent_s=0.0, scheduled_s=0.0),
        record((0.9, 2), (2.0, 2), sent_s=0.5, scheduled_s=0.4),
        record(sent_s=1.5, end_s=1.6, error="request", scheduled_s=1.5),
        record((2.2, 1), sent_s=2.1, end_s=2.5, error="interrupted", scheduled_s=2.1),
    ]
    metrics = compute_metrics(records, Objectives(ttft_ms=300))
    assert metrics.duration_s == 2.5
    assert (metrics.num_requests, metrics.num_succeeded, metrics.num_interrupted) == (4, 2, 1)
    assert metrics.failures == {"request": 1}
    assert metrics.first_failures == {"request": "a reason"}
    # Only what belongs to a whole answer counts.
    assert (metrics.num_input_tokens, metrics.num_output_tokens) == (20, 8)
    assert metrics.requests_per_s == pytest.approx(0.8)
    assert metrics.output_tokens_per_s == pytest.approx(3.2)
    assert metrics.total_tokens_per_s == pytest.approx(11.2)
    assert metrics.tokens_per_chunk == 2
    assert (metrics.num_good, metrics.goodput_requests_per_s) == (1, pytest.approx(0.4))
    assert metrics.ttft_ms is not None
    assert metrics.ttft_ms.mean == pytest.approx(300)
    assert metrics.send_lag_ms is not None
    assert metrics.send_lag_ms.max == pytest.approx(100)


def test_a_run_without_requests() -> None:
    metrics = compute_metrics([], Objectives())
    assert (metrics.requests_per_s, metrics.peak_concurrency, metrics.num_good) == (0, 0, None)
    assert metrics.ttft_ms is None


def test_mean_itl_of_equal_answers_is_mean_tpot() -> None:
    rng = np.random.default_rng(0)
    records = [record(*[(float(t), 1) for t in np.cumsum(rng.random(20))]) for _ in range(5)]
    metrics = compute_metrics(records, Objectives())
    assert metrics.itl_ms is not None
    assert metrics.tpot_ms is not None
    assert metrics.itl_ms.mean == pytest.approx(metrics.tpot_ms.mean)


@pytest.mark.parametrize(
    ("objectives", "is_good"),
    [
        (["ttft:500"], True),
        (["ttft:499"], False),
        (["ttft:500", "tpot:100"], True),
        (["ttft:500 tpot:99"], False),
        (["ttft:500,tpot:100,e2el:700"], True),
        (["e2el:699"], False),
    ],
)
def test_a_request_is_good_if_it_meets_all_limits(objectives: list[str], is_good: bool) -> None:
    request = record((0.5, 1), (0.6, 1), (0.7, 1))
    assert Objectives.parse(objectives).met_by(request) is is_good


def test_goodput_leaves_out_failures_and_takes_answers_of_one_token() -> None:
    assert not Objectives(ttft_ms=1e6).met_by(record((0.5, 1), error="server"))
    assert Objectives(tpot_ms=1).met_by(record((0.5, 1)))


@pytest.mark.parametrize("text", ["itl:5", "ttft", "ttft:", "ttft:-1", "ttft:0", "ttft:nan", "tpot:5ms"])
def test_wrong_objectives_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Objectives.parse([text])


def test_peak_concurrency() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (3.5, 5.0)]
    records = [record(sent_s=start, end_s=end) for start, end in spans]
    # At 2.0 the first ends as the third begins: never are three in flight.
    assert peak_concurrency(records) == 2
    assert [number for _, number in concurrency_steps(records)] == [1, 2, 1, 2, 1, 2, 1, 0]


# --------------------------------------------------------------------------- the server's own counts

BEFORE = """\
# HELP trtforge_tokens_total Tokens
# TYPE trtforge_tokens_total counter
trtforge_tokens_total{model="llm",kind="a b"} 10
# TYPE trtforge_running gauge
trtforge_running{model="llm"} 3
# TYPE nv_inference_count counter
nv_inference_count{model="llm"} 7
"""
AFTER = """\
# TYPE trtforge_tokens_total counter
trtforge_tokens_total{model="llm",kind="a b"} 14.5
# TYPE trtforge_running gauge
trtforge_running{model="llm"} 1
# TYPE trtforge_step_seconds histogram
trtforge_step_seconds_bucket{le="+Inf"} 4
trtforge_step_seconds_sum 0.5
trtforge_step_seconds_count 4
"""


def test_server_counters_are_differences_and_gauges_are_not() -> None:
    metrics = {metric.series: metric for metric in compare(parse_metrics(BEFORE), parse_metrics(AFTER))}
    assert metrics['trtforge_tokens_total{model="llm",kind="a b"}'].change == 4.5
    running = metrics['trtforge_running{model="llm"}']
    assert (running.before, running.after, running.change) == (3, 1, None)
    # A family that appears during the run began at 0.
    assert metrics["trtforge_step_seconds_sum"].change == 0.5
    assert metrics["trtforge_step_seconds_count"].kind == "histogram"
    assert not any(series.startswith("nv_") for series in metrics)

"""The charts of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trtforge.client.bench.metrics import Objectives, RunMetrics, Summary, concurrency_steps
from trtforge.client.bench.records import RequestRecord
from trtforge.client.bench.report import RunResult, format_number
from trtforge.client.bench.svg import FRAME_HEIGHT, WIDE, Axis, Chart

NUM_STYLES = 8  # colours of runs, c0 to c7
MAX_TIMELINE_ROWS = 300
_CDF_POINTS = 200
_CDF_TAIL = 0.002  # what of the short end may lie outside the axis
_NAMED_PERCENTILES = (10, 25, 50, 75, 90, 99)
_NUM_BINS = 80
_NUM_WIDE_BINS = 160
_CONCURRENCY_HEIGHT = 200.0
_TIMELINE_ROW_HEIGHT = (2.0, 16.0)
_TIMELINE_HEIGHT = 520.0


def run_style(number: int) -> str:
    """The CSS class of a run's colour."""
    return f"c{number % NUM_STYLES}"


def cdf(name: str, runs: Sequence[RunResult], values_s: Callable[[RequestRecord], Sequence[float]]) -> str:
    """The share of values at or below each latency, a line for each run."""
    chosen = [
        np.array([value * 1000 for record in run.records if record.succeeded for value in values_s(record)])
        for run in runs
    ]
    known = [values for values in chosen if values.size]
    bounds = [float(q) for values in known for q in np.quantile(values, [_CDF_TAIL, 1])]
    chart = Chart(
        Axis.spread(f"{name}, ms", bounds), Axis("% of values", 0, 100), name=f"{name}: distribution"
    )
    for number, (run, values) in enumerate(zip(runs, chosen, strict=True)):
        if not values.size:
            continue
        shares = np.linspace(0, 100, _CDF_POINTS + 1)
        style = run_style(number)
        chart.line(list(zip(np.percentile(values, shares).tolist(), shares.tolist(), strict=True)), style)
        for percentile in _NAMED_PERCENTILES:
            value = float(np.percentile(values, percentile))
            title = f"{run.label}: {percentile} % within {format_number(value)} ms"
            chart.dot((value, percentile), style, title)
    return chart.render()


def sweep(name: str, runs: Sequence[RunResult], summary_of: Callable[[RunMetrics], Summary | None]) -> str:
    """A latency against the throughput that it is paid with: p50 and p99, a dot for each run."""
    known = [(run, summary) for run in runs if (summary := summary_of(run.metrics)) is not None]
    chart = Chart(
        Axis.from_zero("output tokens/s", [run.metrics.output_tokens_per_s for run, _ in known]),
        Axis.spread(f"{name}, ms", [value for _, s in known for value in (s.p50, s.p99)]),
        name=f"{name} against throughput",
    )
    for column, style in (("p50", "c0"), ("p99", "c1")):
        points = [(run.metrics.output_tokens_per_s, getattr(summary, column)) for run, summary in known]
        chart.line(points, style)
        for (run, _), point in zip(known, points, strict=True):
            title = f"{run.label}: {format_number(point[0])} tokens/s, "
            title += f"{name} {column} {format_number(point[1])} ms"
            chart.dot(point, style, title, radius=4.5)
            if column == "p99":
                chart.text(point, run.label.removeprefix("concurrency "))
    return chart.render()


def latency_over_time(records: Sequence[RequestRecord], objectives: Objectives) -> str:
    """TTFT and E2EL of each request at the time it was sent."""
    good = [record for record in records if record.succeeded]
    latencies = [s * 1000 for record in good for s in (record.ttft_s, record.e2el_s) if s is not None]
    limits = {
        name: limit
        for name, limit in (("TTFT", objectives.ttft_ms), ("E2EL", objectives.e2el_ms))
        if limit is not None
    }
    chart = Chart(
        Axis("sent after, s", 0, _duration_s(records)),
        Axis.spread("latency, ms", [*latencies, *limits.values()]),
        name="Latency over time",
    )
    for record in good:
        for name, seconds, style in (("E2EL", record.e2el_s, "c1"), ("TTFT", record.ttft_s, "c0")):
            if seconds is not None:
                title = f"request {record.index}: {name} {format_number(seconds * 1000)} ms"
                chart.dot((record.sent_s, seconds * 1000), style, title)
    for name, limit in limits.items():
        chart.level(limit, f"{name} limit {limit:g} ms")
    return chart.render()


def throughput_over_time(records: Sequence[RequestRecord]) -> str:
    """Output tokens a second, in equal parts of the run."""
    duration_s = _duration_s(records)
    width_s = duration_s / _NUM_BINS
    arrivals = [(chunk.arrival_s, chunk.num_tokens) for record in records for chunk in record.chunks]
    times, weights = zip(*arrivals, strict=True) if arrivals else ((), ())
    counts, _ = np.histogram(times, bins=_NUM_BINS, range=(0, duration_s), weights=weights)
    rates = (counts / width_s).tolist()
    chart = Chart(
        Axis("time, s", 0, duration_s), Axis.from_zero("tokens/s", rates), name="Throughput over time"
    )
    for number, rate in enumerate(rates):
        start, end = number * width_s, (number + 1) * width_s
        title = f"{start:.2f} to {end:.2f} s: {format_number(rate)} tokens/s"
        chart.box((start, 0), (end, rate), "c0", title)
    return chart.render()


def concurrency_over_time(records: Sequence[RequestRecord]) -> str:
    """Requests in flight, the mean over time in equal parts of the run."""
    duration_s = _duration_s(records)
    edges = np.linspace(0, duration_s, _NUM_WIDE_BINS + 1)
    times, numbers = zip(*concurrency_steps(records), strict=True)
    # Time times requests from the start up to each change, and by interpolation up to each edge.
    areas = np.concatenate([[0.0], np.cumsum(np.diff(times) * numbers[:-1])])
    means = np.diff(np.interp(edges, times, areas)) / np.diff(edges)
    chart = Chart(
        Axis("time, s", 0, duration_s),
        Axis.from_zero("in flight", means.tolist()),
        name="Requests in flight over time",
        size=(WIDE, _CONCURRENCY_HEIGHT),
    )
    chart.line(
        list(zip(((edges[:-1] + edges[1:]) / 2).tolist(), means.tolist(), strict=True)), "c2", area=True
    )
    return chart.render()


def _duration_s(records: Sequence[RequestRecord]) -> float:
    return max(record.end_s for record in records)


def timeline(records: Sequence[RequestRecord]) -> str:
    """A bar for each request, from sending to its end: before and after the first token; a dot if it failed.

    Of more than MAX_TIMELINE_ROWS requests every n-th is shown.
    """
    shown = sorted(records, key=lambda record: record.sent_s)[:: timeline_stride(records)]
    least, most = _TIMELINE_ROW_HEIGHT
    row_height = min(max(_TIMELINE_HEIGHT / len(shown), least), most)
    chart = Chart(
        Axis("time, s", 0, _duration_s(records)),
        Axis("requests in the order sent", 0, len(shown)),
        name="Timeline of requests",
        size=(WIDE, FRAME_HEIGHT + row_height * len(shown)),
        has_y_ticks=False,
    )
    for row, record in enumerate(shown):
        top, bottom = len(shown) - row - 0.1, len(shown) - row - 0.9
        first_s = record.chunks[0].arrival_s if record.chunks else record.end_s
        title = _timeline_title(record)
        chart.box((record.sent_s, top), (first_s, bottom), "wait", title)
        if record.chunks:
            chart.box((first_s, top), (record.end_s, bottom), "answer", title)
        if record.error:  # often too short for a bar
            chart.dot((record.end_s, (top + bottom) / 2), "bad", title, radius=3.5)
    return chart.render()


def timeline_stride(records: Sequence[RequestRecord]) -> int:
    """Every how many-th request the timeline shows."""
    return -(-len(records) // MAX_TIMELINE_ROWS)


def _timeline_title(record: RequestRecord) -> str:
    title = f"request {record.index}: sent at {record.sent_s:.3f} s, {record.num_input_tokens} tokens in, "
    title += f"{record.num_output_tokens} out"
    if record.ttft_s is not None:
        title += f", TTFT {format_number(record.ttft_s * 1000)} ms"
    if record.tpot_s is not None:
        title += f", TPOT {format_number(record.tpot_s * 1000)} ms"
    title += f", E2EL {format_number(record.e2el_s * 1000)} ms"
    return f"{title}; {record.error}: {record.message}" if record.error else title

"""All that a command measured: as data for JSON, and as a table for the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from trtforge.client.bench.metrics import Objectives, RunMetrics, Summary
from trtforge.client.bench.records import RequestRecord
from trtforge.client.bench.server_metrics import ServerMetric

REPORT_VERSION = 1
_DECIMALS_MS = 3


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run, of one load."""

    label: str
    metrics: RunMetrics
    records: Sequence[RequestRecord]
    server_metrics: Sequence[ServerMetric]
    generator_cores: float  # processor time of this process by time passed: near 1 it is the bottleneck


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All runs of a command, and all that one has to know to repeat them."""

    created: str  # ISO 8601
    trtforge_version: str
    git_commit: str | None
    machine: Mapping[str, str | int]
    settings: Mapping[str, str | int | float | bool | None]  # the command's options, as they applied
    objectives: Objectives
    runs: Sequence[RunResult]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: latencies in ms, times in seconds after the start of their run."""
        return {
            "report_version": REPORT_VERSION,
            "created": self.created,
            "trtforge_version": self.trtforge_version,
            "git_commit": self.git_commit,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "runs": [_run_dict(run) for run in self.runs],
        }


def _run_dict(run: RunResult) -> dict[str, Any]:
    return {
        "load": run.label,
        "metrics": dataclasses.asdict(run.metrics),
        "generator_cores": round(run.generator_cores, 3),
        "server_metrics": [
            {**dataclasses.asdict(metric), "change": metric.change} for metric in run.server_metrics
        ],
        "requests": [_record_dict(record) for record in run.records],
    }


def _record_dict(record: RequestRecord) -> dict[str, Any]:
    return {
        "index": record.index,
        "scheduled_s": None if record.scheduled_s is None else round(record.scheduled_s, 6),
        "sent_s": round(record.sent_s, 6),
        "ttft_ms": _ms(record.ttft_s),
        "tpot_ms": _ms(record.tpot_s),
        "e2el_ms": _ms(record.e2el_s),
        "itls_ms": [_ms(gap) for gap in record.itls_s],
        "chunk_tokens": [chunk.num_tokens for chunk in record.chunks],
        "num_input_tokens": record.num_input_tokens,
        "num_output_tokens": record.num_output_tokens,
        "max_tokens": record.max_tokens,
        "error": record.error,
        "message": record.message,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, _DECIMALS_MS)


# --------------------------------------------------------------------------- figures as text


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of a table: a name, a unit, and how to find it in the metrics of a run."""

    name: str
    unit: str
    value: Callable[[RunMetrics], float | None]

    def text(self, metrics: RunMetrics) -> str:
        """The value with its digits, or a dash."""
        value = self.value(metrics)
        return "–" if value is None else format_number(value)


COUNTS = (
    Figure("requests sent", "", lambda m: m.num_requests),
    Figure("succeeded", "", lambda m: m.num_succeeded),
    Figure("failed", "", lambda m: sum(m.failures.values())),
    Figure("interrupted", "", lambda m: m.num_interrupted or None),
    Figure("duration", "s", lambda m: m.duration_s),
    Figure("input tokens", "", lambda m: m.num_input_tokens),
    Figure("output tokens", "", lambda m: m.num_output_tokens),
    Figure("tokens per chunk", "", lambda m: m.tokens_per_chunk),
    Figure("peak concurrency", "", lambda m: m.peak_concurrency),
)
RATES = (
    Figure("request throughput", "1/s", lambda m: m.requests_per_s),
    Figure("output throughput", "tokens/s", lambda m: m.output_tokens_per_s),
    Figure("total throughput", "tokens/s", lambda m: m.total_tokens_per_s),
    Figure("goodput", "1/s", lambda m: m.goodput_requests_per_s),
)
LATENCIES: tuple[tuple[str, Callable[[RunMetrics], Summary | None]], ...] = (
    ("TTFT", lambda m: m.ttft_ms),
    ("ITL", lambda m: m.itl_ms),
    ("TPOT", lambda m: m.tpot_ms),
    ("E2EL", lambda m: m.e2el_ms),
    ("send lag", lambda m: m.send_lag_ms),
)
SUMMARY_COLUMNS = tuple(field.name for field in dataclasses.fields(Summary))


def format_number(value: float) -> str:
    """Four digits or all before the point, as people read them."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{1 if magnitude >= 100 else 2 if magnitude >= 1 else 3}f}"


def latency_rows(metrics: RunMetrics) -> list[tuple[str, list[str]]]:
    """(name, a text for each of SUMMARY_COLUMNS) of every latency."""
    rows = []
    for name, summary_of in LATENCIES:
        summary = summary_of(metrics)
        if summary is not None:
            rows.append((name, [format_number(getattr(summary, column)) for column in SUMMARY_COLUMNS]))
    return rows


def tables(report: BenchReport) -> list[Table]:
    """Two tables for each run, and one of all runs if there are several."""
    found = [make(run) for run in report.runs for make in (_latency_table, _figure_table)]
    if len(report.runs) > 1:
        found.append(_sweep_table(report.runs))
    return found


def _latency_table(run: RunResult) -> Table:
    table = Table(title=run.label, title_justify="left", title_style="bold")
    table.add_column("ms")
    for column in SUMMARY_COLUMNS:
        table.add_column(column, justify="right")
    for name, cells in latency_rows(run.metrics):
        table.add_row(name, *cells)
    return table


def _figure_table(run: RunResult) -> Table:
    table = Table(show_header=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for figures in (RATES, COUNTS):
        for figure in figures:
            if (text := figure.text(run.metrics)) != "–":
                table.add_row(figure.name, text, figure.unit)
        table.add_section()
    for kind, number in run.metrics.failures.items():
        table.add_row(f"failed: {kind}", str(number), "")
    table.add_row("load generator", format_number(run.generator_cores), "cores")
    for metric in run.server_metrics:
        if metric.change and "_bucket" not in metric.series:
            table.add_row(metric.series, f"+{format_number(metric.change)}", "")
    return table


def _sweep_table(runs: Sequence[RunResult]) -> Table:
    table = Table(title="All runs; latencies in ms", title_justify="left", title_style="bold")
    table.add_column("load", no_wrap=True)
    for heading in ("req/s", "out tok/s", "TTFT p50", "p99", "ITL p50", "p99", "failed"):
        table.add_column(heading, justify="right")
    for run in runs:
        metrics = run.metrics
        cells = [format_number(metrics.requests_per_s), format_number(metrics.output_tokens_per_s)]
        for summary in (metrics.ttft_ms, metrics.itl_ms):
            cells += ["–", "–"] if summary is None else [format_number(v) for v in (summary.p50, summary.p99)]
        table.add_row(run.label, *cells, str(sum(metrics.failures.values())))
    return table

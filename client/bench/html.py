"""The report as one HTML page that needs nothing else: no script, no font, no file beside it.

The page is also well-formed XML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from trtforge.client.bench import charts
from trtforge.client.bench.html_style import CSS
from trtforge.client.bench.metrics import RunMetrics
from trtforge.client.bench.report import (
    COUNTS,
    RATES,
    SUMMARY_COLUMNS,
    BenchReport,
    RunResult,
    format_number,
    latency_rows,
)

_GIBIBYTE = 1 << 30


def render_html(report: BenchReport) -> str:
    """The whole page."""
    model = str(report.settings["model"])
    title = f"Load test of {model}"
    body = [f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(_lead(report))}</p></header>"]
    if report.runs:
        body += _overview(report)
        body += [_run_section(report, run, is_only=len(report.runs) == 1) for run in report.runs]
    else:
        body.append("<p class='problem'>Interrupted before the first run.</p>")
    body += [_facts(report)]
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _lead(report: BenchReport) -> str:
    commit = f", commit {report.git_commit}" if report.git_commit else ""
    date = report.created.replace("T", " ")
    return f"{date} · trtforge {report.trtforge_version}{commit} · {report.machine['cpu']}"


# --------------------------------------------------------------------------- all runs


def _overview(report: BenchReport) -> Iterable[str]:
    runs = report.runs
    if len(runs) == 1:
        yield _cards(runs[0].metrics)
    else:
        yield f"<h2>All runs</h2>{_overview_table(runs)}<h2>Throughput and what it costs</h2>"
        percentiles = (("c0", "p50"), ("c1", "p99"))
        yield _figures(
            _figure("TTFT against throughput", charts.sweep("TTFT", runs, lambda m: m.ttft_ms), percentiles),
            _figure("ITL against throughput", charts.sweep("ITL", runs, lambda m: m.itl_ms), percentiles),
        )
    legend = [(charts.run_style(number), run.label) for number, run in enumerate(runs) if len(runs) > 1]
    yield "<h2>Latencies</h2>"
    yield _figures(
        _figure(
            "Time to first token",
            charts.cdf("TTFT", runs, lambda record: [] if record.ttft_s is None else [record.ttft_s]),
            legend,
        ),
        _figure("Inter-token latency", charts.cdf("ITL", runs, lambda record: record.itls_s), legend),
    )


def _cards(metrics: RunMetrics) -> str:
    failed = sum(metrics.failures.values())
    cards = [
        _card("Output tokens", metrics.output_tokens_per_s, "/s"),
        _card("Requests", metrics.requests_per_s, "/s"),
    ]
    for name, summary in (("TTFT", metrics.ttft_ms), ("ITL", metrics.itl_ms), ("E2EL", metrics.e2el_ms)):
        if summary is not None:
            more = f"p90 {format_number(summary.p90)} · p99 {format_number(summary.p99)}"
            cards.append(_card(f"{name}, median", summary.p50, "ms", more))
    if metrics.goodput_requests_per_s is not None:
        more = f"{metrics.num_good} of {metrics.num_requests} within the limits"
        cards.append(_card("Goodput", metrics.goodput_requests_per_s, "/s", more))
    more = f"{failed} failed, {metrics.num_interrupted} interrupted"
    cards.append(
        _card("Succeeded", metrics.num_succeeded, f"of {metrics.num_requests}", more, is_bad=failed > 0)
    )
    return f"<div class='cards'>{''.join(cards)}</div>"


def _card(name: str, value: float, unit: str, more: str = "", *, is_bad: bool = False) -> str:
    style = "card bad" if is_bad else "card"
    return (
        f"<div class='{style}'><div class='name'>{escape(name)}</div>"
        f"<div class='value'>{format_number(value)}<small>{escape(unit)}</small></div>"
        f"<div class='more'>{escape(more)}</div></div>"
    )


def _overview_table(runs: Sequence[RunResult]) -> str:
    rows = []
    names = ["requests/s", "output tokens/s", "total tokens/s", "goodput 1/s"]
    heads = [*names, *(f"{name} {p}" for name in ("TTFT", "ITL", "E2EL") for p in ("p50", "p99")), "failed"]
    for number, run in enumerate(runs):
        metrics = run.metrics
        cells = [figure.text(metrics) for figure in RATES]
        for summary in (metrics.ttft_ms, metrics.itl_ms, metrics.e2el_ms):
            cells += ["–", "–"] if summary is None else [format_number(v) for v in (summary.p50, summary.p99)]
        swatch = f"<span class='swatch {charts.run_style(number)}'></span>"
        rows.append((swatch + escape(run.label), [*cells, str(sum(metrics.failures.values()))]))
    return _table(("load", *heads), rows)


# --------------------------------------------------------------------------- one run


def _run_section(report: BenchReport, run: RunResult, *, is_only: bool) -> str:
    content = _run_charts(report, run) + _run_tables(run)
    for kind, number in run.metrics.failures.items():
        message = run.metrics.first_failures[kind]
        content += (
            f"<p class='problem'>{number} failed ({escape(kind)}), the first one: {escape(message)}</p>"
        )
    heading = f"<h2>{escape(run.label[0].upper() + run.label[1:])}</h2>"
    if is_only:
        return f"<section>{heading}{content}</section>"
    return f"<details><summary>{heading}</summary>{content}</details>"


def _run_charts(report: BenchReport, run: RunResult) -> str:
    records = run.records
    if not records:
        return "<p class='problem'>No request was sent.</p>"
    stride = charts.timeline_stride(records)
    note = "one row a request" if stride == 1 else f"one row for every {stride}th request"
    parts: tuple[tuple[str, str], ...] = (("wait", "until the first token"), ("answer", "answer"))
    if any(record.error for record in records):
        parts += (("bad", "failed or interrupted"),)
    return _figures(
        _figure(
            "Latency over time",
            charts.latency_over_time(records, report.objectives),
            (("c0", "TTFT"), ("c1", "E2EL")),
        ),
        _figure("Output throughput over time", charts.throughput_over_time(records)),
        _figure("Requests in flight", charts.concurrency_over_time(records), wide=True),
        _figure("Timeline", charts.timeline(records), parts, note=note, wide=True),
    )


def _run_tables(run: RunResult) -> str:
    latencies = [(escape(name), cells) for name, cells in latency_rows(run.metrics)]
    counts = [(escape(figure.name), [figure.text(run.metrics), figure.unit]) for figure in (*RATES, *COUNTS)]
    counts.append(("load generator", [format_number(run.generator_cores), "cores"]))
    tables = [_table(("ms", *SUMMARY_COLUMNS), latencies), _table(("", "value", "unit"), counts)]
    if run.server_metrics:
        # Buckets are in the JSON: a histogram's sum and count say enough here.
        rows = [
            (
                escape(metric.series),
                [
                    format_number(metric.before),
                    format_number(metric.after),
                    "" if metric.change is None else format_number(metric.change),
                ],
            )
            for metric in run.server_metrics
            if "_bucket{" not in metric.series
        ]
        tables.append(_table(("server metric", "before", "after", "change"), rows))
    return f"<h3 class='figures'>Figures</h3><div class='tables'>{''.join(tables)}</div>"


# --------------------------------------------------------------------------- parts


def _facts(report: BenchReport) -> str:
    machine = report.machine
    settings = [
        (escape(name), [escape(f"{value:,}" if isinstance(value, int) and value > 9999 else str(value))])
        for name, value in report.settings.items()
        if value is not None
    ]
    about = [
        ("date", report.created),
        ("trtforge", report.trtforge_version),
        ("commit", report.git_commit or "not in a checkout"),
        ("processor", machine["cpu"]),
        ("cores", machine["cores"]),
        ("memory", f"{int(machine['memory_bytes']) / _GIBIBYTE:.1f} GiB"),
        ("system", machine["system"]),
        ("Python", machine["python"]),
    ]
    rows = [(name, [escape(str(value))]) for name, value in about]
    return (
        "<h2>Set-up</h2><div class='tables'>"
        f"{_table(('what was sent', ''), settings, 'facts')}"
        f"{_table(('load generator', ''), rows, 'facts')}</div>"
    )


def _figures(*figures: str) -> str:
    return f"<div class='charts'>{''.join(figures)}</div>"


def _figure(
    title: str, svg: str, legend: Sequence[tuple[str, str]] = (), *, note: str = "", wide: bool = False
) -> str:
    items = "".join(f"<li class='{style}'>{escape(text)}</li>" for style, text in legend)
    shown_legend = f"<ul class='legend'>{items}</ul>" if items else ""
    shown_note = f"<p>{escape(note)}</p>" if note else ""
    style = " class='wide'" if wide else ""
    return (
        f"<figure{style}><figcaption><h3>{escape(title)}</h3>{shown_note}{shown_legend}</figcaption>"
        f"{svg}</figure>"
    )


def _table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], style: str = "") -> str:
    """`rows` are (name, cells), escaped already."""
    head = "".join(f"<th scope='col'>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th scope='row'>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        f"<div class='table'><table class='{style}'><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )

"""The reports of a load test: whole, well-formed, and safe to open."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from trtforge.client.bench.charts import MAX_TIMELINE_ROWS
from trtforge.client.bench.html import render_html
from trtforge.client.bench.metrics import Objectives, compute_metrics
from trtforge.client.bench.records import RequestRecord, TokenChunk
from trtforge.client.bench.report import BenchReport, RunResult, format_number
from trtforge.client.bench.server_metrics import ServerMetric
from trtforge.client.bench.svg import Axis, format_tick

XHTML = "{http://www.w3.org/1999/xhtml}"
NASTY = "<script>alert('&')</script> \"\x7f"
OBJECTIVES = Objectives(ttft_ms=90, e2el_ms=900)


def make_records(num: int, num_failed: int = 0) -> list[RequestRecord]:
    """Requests with random times; the last ones fail."""
    rng = np.random.default_rng(num)
    records = []
    for index in range(num):
        is_bad = index >= num - num_failed
        times = (index * 0.1 + np.cumsum(rng.gamma(2, 0.02, 12))).tolist()
        chunks = () if is_bad else tuple(TokenChunk(time, 1 + (k % 3 == 0)) for k, time in enumerate(times))
        records.append(
            RequestRecord(
                index=index,
                scheduled_s=index * 0.1,
                sent_s=index * 0.1,
                end_s=times[-1],
                chunks=chunks,
                num_input_tokens=0 if is_bad else 10,
                max_tokens=16,
                error="request" if is_bad else None,
                message=NASTY if is_bad else "",
            )
        )
    return records


def make_report(*runs: list[RequestRecord]) -> BenchReport:
    results = [
        RunResult(
            label=f"concurrency {2**number}",
            metrics=compute_metrics(records, OBJECTIVES),
            records=records,
            server_metrics=[ServerMetric('trtforge_steps_total{model="llm"}', "counter", 1, 12345)],
            generator_cores=0.25,
        )
        for number, records in enumerate(runs)
    ]
    return BenchReport(
        created="2026-01-02T03:04:05+00:00",
        trtforge_version="1.2.3",
        git_commit="0123456789ab",
        machine={
            "cpu": "A processor", "cores": 6, "memory_bytes": 3 << 30, "system": "A system", "python": "3.11",
        },
        settings={"model": NASTY, "seed": 77, "input length": "3:9", "temperature": None},
        objectives=OBJECTIVES,
        runs=results,
    )  # fmt: skip


def parse(report: BenchReport) -> ET.Element:
    return ET.fromstring(render_html(report).removeprefix("<!DOCTYPE html>\n"))


def figure(page: ET.Element, title: str) -> ET.Element:
    (found,) = (f for f in page.iter(f"{XHTML}figure") if f.findtext(f".//{XHTML}h3") == title)
    return found


def bars(element: ET.Element, style: str) -> list[ET.Element]:
    return [rect for rect in element.iter(f"{XHTML}rect") if style in (rect.get("class") or "").split()]


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    page = parse(make_report(make_records(9, 2)))
    tags = {element.tag.removeprefix(XHTML) for element in page.iter()}
    assert tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    attributes = {name for element in page.iter() for name in element.attrib}
    assert attributes.isdisjoint({"href", "src"})
    assert not any(name.startswith("on") for name in attributes)
    assert page.findtext(f".//{XHTML}h1") == f"Load test of {NASTY}"


def test_the_page_says_how_it_was_measured() -> None:
    text = " ".join(parse(make_report(make_records(9))).itertext())
    for fact in ("A processor", "3.0 GiB", "A system", "1.2.3", "0123456789ab", "2026-01-02", "77", "3:9"):
        assert fact in text
    assert "12,344" in text  # what the server counted
    assert "TTFT limit 90 ms" in text


def test_every_request_is_in_the_charts() -> None:
    page = parse(make_report(make_records(30, 4)))
    timeline = figure(page, "Timeline")
    assert len(bars(timeline, "wait")) == 30
    assert len(bars(timeline, "answer")) == 26
    failures = [c for c in timeline.iter(f"{XHTML}circle") if "bad" in (c.get("class") or "")]
    assert len(failures) == 4
    assert NASTY in (failures[0].findtext(f"{XHTML}title") or "")
    latency = figure(page, "Latency over time")
    assert len(list(latency.iter(f"{XHTML}circle"))) == 2 * 26
    assert all(rect.findtext(f"{XHTML}title") for rect in page.iter(f"{XHTML}rect"))


def test_a_long_run_shows_some_of_its_requests() -> None:
    page = parse(make_report(make_records(2 * MAX_TIMELINE_ROWS + 1)))
    timeline = figure(page, "Timeline")
    assert "every 3th" in " ".join(timeline.itertext())
    assert len(bars(timeline, "wait")) == -(-(2 * MAX_TIMELINE_ROWS + 1) // 3)


def test_marks_lie_within_their_charts() -> None:
    page = parse(make_report(make_records(30, 4), make_records(12)))
    svgs = list(page.iter(f"{XHTML}svg"))
    assert len(svgs) == 2 + 2 + 2 * 4
    for svg in svgs:
        width, height = map(float, (svg.get("viewBox") or "").split()[2:])
        for mark in (*svg.iter(f"{XHTML}circle"), *svg.iter(f"{XHTML}rect")):
            x, y = float(mark.get("cx") or mark.get("x")), float(mark.get("cy") or mark.get("y"))  # type: ignore[arg-type]
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_a_sweep_has_a_curve_and_a_row_for_each_run() -> None:
    runs = [make_records(12), make_records(15), make_records(20)]
    page = parse(make_report(*runs))
    circles = list(figure(page, "TTFT against throughput").iter(f"{XHTML}circle"))
    assert len(circles) == 2 * 3
    (overview, *_) = page.iter(f"{XHTML}tbody")
    assert [row.findtext(f"{XHTML}th/{XHTML}span") is not None for row in overview] == [True] * 3


@pytest.mark.parametrize("runs", [(), ([],), (make_records(5, 5),), (make_records(1),)])
def test_runs_with_little_in_them_still_make_a_page(runs: tuple[list[RequestRecord], ...]) -> None:
    assert "A processor" in " ".join(parse(make_report(*runs)).itertext())


def test_json_has_every_request_and_every_gap() -> None:
    data = json.loads(json.dumps(make_report(make_records(6, 1)).as_dict()))
    (run,) = data["runs"]
    assert [request["index"] for request in run["requests"]] == list(range(6))
    first, *_, last = run["requests"]
    assert len(first["itls_ms"]) == first["num_output_tokens"] - 1 == 15
    assert sum(first["itls_ms"]) == pytest.approx(first["e2el_ms"] - first["ttft_ms"], abs=0.1)
    assert (last["error"], last["message"], last["ttft_ms"]) == ("request", NASTY, None)
    assert run["metrics"]["failures"] == {"request": 1}
    assert data["settings"]["seed"] == 77
    assert data["git_commit"] == "0123456789ab"


def test_numbers_as_people_read_them() -> None:
    values = (0, 7, 0.12345, 1.2345, 123.45, 12345.6, 1234567)
    assert [format_number(value) for value in values] == [
        "0", "7", "0.123", "1.23", "123.5", "12,346", "1,234,567",
    ]  # fmt: skip
    assert [format_tick(value) for value in (0.0, 0.25, 1500.0, 20000.0)] == ["0", "0.25", "1500", "20k"]


def test_axes_have_round_ticks_that_hold_all_values() -> None:
    axis = Axis.from_zero("x", [3.0, 97.0])
    assert (axis.high, axis.ticks()) == (100, [0, 20, 40, 60, 80, 100])
    axis = Axis.spread("x", [3.0, 970.0])
    assert (axis.low, axis.high, axis.is_log) == (2, 1000, True)
    assert axis.ticks() == [2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert axis.fraction(1) == 0
    assert axis.fraction(np.sqrt(2000.0)) == pytest.approx(0.5)
    assert not Axis.spread("x", [0.0, 5.0]).is_log

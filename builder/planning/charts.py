"""The picture of a plan: throughput and latency of decode by batch size."""

from __future__ import annotations

from pathlib import Path

from trtforge.builder.planning.report import PlanReport
from trtforge.chart import Chart, Series, write_svg
from trtforge.errors import ConfigError


def write_charts(report: PlanReport, file: Path) -> None:
    """Write tokens/s and the time of a step by batch size, a line for each context length that fits.

    Raises ConfigError if there is nothing to draw.
    """
    points = [point for point in report.decode if point.fits]
    if not points:
        raise ConfigError(
            f"--svg {file} has nothing to draw: "
            + ("the model does not fit" if report.decode else f"no times are predicted for {report.gpu}")
        )
    contexts = sorted({point.context_len for point in points})
    throughput, latency = [], []
    for context in contexts:
        line = [point for point in points if point.context_len == context]
        batches = [point.batch for point in line]
        name = f"{context:,} tokens each"
        throughput.append(Series(name, batches, [point.tokens_per_s for point in line]))
        latency.append(Series(name, batches, [point.step_ms for point in line]))
    what = f"{report.architecture}, {report.weights}, {report.tp * report.pp} x {report.gpu}"
    bound = "upper bound" if report.efficiency == 1 else f"at efficiency {report.efficiency:g}"
    write_svg(
        file,
        [
            Chart(f"Decode throughput, {bound}: {what}", "batch", "tokens/s", throughput, is_log_x=True),
            Chart("Time of a decode step", "batch", "ms", latency, is_log_x=True),
        ],
    )

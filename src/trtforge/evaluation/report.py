"""What an evaluation came to: a table for people, JSON for programs, charts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from trtforge.chart import Chart, Series, write_svg
from trtforge.evaluation.scoring import Rows, perplexity_of


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model's figures."""

    name: str
    runtime: str
    dtype: str
    weight_bytes: int
    perplexity: float
    perplexity_error: float  # standard error
    prefill_tokens_per_s: float
    decode_tokens_per_s: float  # of one sequence: by the median of the timed steps
    decode_best_tokens_per_s: float  # by the fastest of them


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model's distributions are from its reference's."""

    perplexity_ratio: float
    perplexity_ratio_error: float  # standard error, of differences token by token
    mean_kl: float  # nats
    p99_kl: float
    max_kl: float
    top1: float  # tokens whose likeliest prediction is the same, from 0 to 1


@dataclass(frozen=True, slots=True)
class WindowFigures:
    """The scored tokens of one window."""

    end: int  # tokens of the text up to its end
    perplexity: float
    reference_perplexity: float | None
    mean_kl: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A text, scored by a model and, if there is one, by its reference."""

    window: int  # tokens
    stride: int
    num_tokens: int  # of the text
    num_scored: int
    model: ModelFigures
    reference: ModelFigures | None
    divergence: Divergence | None
    windows: tuple[WindowFigures, ...]

    def save(self, file: Path) -> None:
        """Write everything as JSON."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def draw(self, file: Path) -> None:
        """Write perplexity by window and, with a reference, KL divergence as SVG."""
        ends = [window.end for window in self.windows]
        series = [Series(self.model.name, ends, [window.perplexity for window in self.windows])]
        if self.reference is not None:
            values = [window.reference_perplexity or 0.0 for window in self.windows]
            series.append(Series(self.reference.name, ends, values))
        text = f"{self.num_scored:,} tokens in windows of {self.window:,}, stride {self.stride:,}"
        charts = [Chart(f"Perplexity of a window: {text}", "tokens of the text", "perplexity", series)]
        if self.divergence is not None:
            values = [window.mean_kl or 0.0 for window in self.windows]
            title = f"Mean KL divergence from {series[1].name}"
            charts.append(Chart(title, "tokens of the text", "nats", [Series(self.model.name, ends, values)]))
        write_svg(file, charts)

    def table(self) -> Table:
        """The figures, for a terminal."""
        title = f"{self.num_scored:,} tokens, window {self.window:,}, stride {self.stride:,}"
        table = Table(title=title, title_justify="left")
        models = [self.model] if self.reference is None else [self.model, self.reference]
        table.add_column("figure")
        for figures in models:
            table.add_column(figures.name, justify="right", overflow="fold")
        rows: dict[str, list[str]] = {
            "runtime, dtype": [f"{each.runtime}, {each.dtype}" for each in models],
            "perplexity": [f"{each.perplexity:.3f} ± {each.perplexity_error:.3f}" for each in models],
        }
        if self.divergence is not None:
            ours = self.divergence
            change = f"{ours.perplexity_ratio - 1:+.2%} ± {ours.perplexity_ratio_error:.2%}"
            rows |= {
                "perplexity, change": [change],
                "KL divergence, nats: mean": [f"{ours.mean_kl:.3g}"],
                "KL divergence: 99 %": [f"{ours.p99_kl:.3g}"],
                "KL divergence: largest": [f"{ours.max_kl:.3g}"],
                "same likeliest token": [f"{ours.top1:.2%}"],
            }
        rows |= {
            "weights, MiB": [f"{each.weight_bytes / 2**20:,.1f}" for each in models],
            "prefill, tokens/s": [f"{each.prefill_tokens_per_s:,.0f}" for each in models],
            "decode, tokens/s: median": [f"{each.decode_tokens_per_s:,.1f}" for each in models],
            "decode, tokens/s: best": [f"{each.decode_best_tokens_per_s:,.1f}" for each in models],
        }
        for name, values in rows.items():
            table.add_row(name, *values)
        return table


def window_figures(end: int, rows: Rows) -> WindowFigures:
    """The figures of one window's rows."""
    perplexity = math.exp(rows.losses.mean())
    if not len(rows.divergences):
        return WindowFigures(end, perplexity, None, None)
    reference = math.exp(rows.reference_losses.mean())
    return WindowFigures(end, perplexity, reference, float(rows.divergences.mean()))


def divergence_of(rows: Rows) -> Divergence | None:
    """The distance from the reference; None without one."""
    if not len(rows.divergences):
        return None
    ratio, error = perplexity_of(rows.losses - rows.reference_losses)
    return Divergence(
        perplexity_ratio=ratio,
        perplexity_ratio_error=error,
        mean_kl=float(rows.divergences.mean()),
        p99_kl=float(np.quantile(rows.divergences, 0.99)),
        max_kl=float(rows.divergences.max()),
        top1=float(rows.agreements.mean()),
    )

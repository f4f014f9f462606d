"""The figures of a run, out of the records of its requests. docs/load-testing.md defines each."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trtforge.client.bench.records import RequestRecord
from trtforge.errors import ConfigError

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution in a few numbers. Percentiles are interpolated linearly between ranks."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Summary | None:
        """None if there are no values."""
        array = np.fromiter(values, dtype=np.float64)
        if not array.size:
            return None
        p50, p90, p99 = np.percentile(array, [50, 90, 99])
        return cls(float(array.mean()), float(p50), float(p90), float(p99), float(array.max()))


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latencies that a request may have at most, in ms, to count for goodput; None: any."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Objectives:
        """`ttft:200`, `tpot:50`, `e2el:2000`, also several of them in one text. Raises ConfigError."""
        limits: dict[str, float] = {}
        for part in " ".join(texts).replace(",", " ").split():
            name, _, value = part.partition(":")
            try:
                limit = float(value)
            except ValueError:
                limit = -1.0
            if name not in ("ttft", "tpot", "e2el") or not limit > 0:
                raise ConfigError(
                    f"the objective {part!r}: give ttft, tpot or e2el, a colon and milliseconds above 0"
                )
            limits[f"{name}_ms"] = limit
        return cls(**limits)

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2el_ms))

    def __str__(self) -> str:
        named = (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("E2EL", self.e2el_ms))
        return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in named if limit is not None)

    def met_by(self, record: RequestRecord) -> bool:
        """Whether the request succeeded within all limits; a TPOT that does not exist is within them."""
        pairs = (
            (record.ttft_s, self.ttft_ms),
            (record.tpot_s, self.tpot_ms),
            (record.e2el_s, self.e2el_ms),
        )
        return record.succeeded and all(
            limit is None or seconds is None or seconds * 1000 <= limit for seconds, limit in pairs
        )


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """The figures of a run. Tokens and latencies are those of the requests that succeeded."""

    duration_s: float
    num_requests: int  # sent
    num_succeeded: int
    num_interrupted: int
    failures: Mapping[str, int]  # by kind
    first_failures: Mapping[str, str]  # the message of the first one of each kind
    num_input_tokens: int
    num_output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    num_good: int | None  # None without objectives
    goodput_requests_per_s: float | None
    peak_concurrency: int
    tokens_per_chunk: float | None
    ttft_ms: Summary | None
    itl_ms: Summary | None
    tpot_ms: Summary | None
    e2el_ms: Summary | None
    send_lag_ms: Summary | None  # how much later than planned requests were sent


def compute_metrics(records: Sequence[RequestRecord], objectives: Objectives) -> RunMetrics:
    """The figures of all requests of a run."""
    good = [record for record in records if record.succeeded]
    failed = [record for record in records if record.error not in (None, INTERRUPTED)]
    duration_s = max((record.end_s for record in records), default=0.0)
    per_s = 1 / duration_s if duration_s else 0.0
    num_input = sum(record.num_input_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    num_chunks = sum(len(record.chunks) for record in good)
    num_good = sum(map(objectives.met_by, records)) if objectives else None
    return RunMetrics(
        duration_s=duration_s,
        num_requests=len(records),
        num_succeeded=len(good),
        num_interrupted=len(records) - len(good) - len(failed),
        failures=dict(Counter(record.error or "" for record in failed)),
        first_failures={record.error or "": record.message for record in reversed(failed)},
        num_input_tokens=num_input,
        num_output_tokens=num_output,
        requests_per_s=len(good) * per_s,
        output_tokens_per_s=num_output * per_s,
        total_tokens_per_s=(num_input + num_output) * per_s,
        num_good=num_good,
        goodput_requests_per_s=None if num_good is None else num_good * per_s,
        peak_concurrency=peak_concurrency(records),
        tokens_per_chunk=num_output / num_chunks if num_chunks else None,
        ttft_ms=_summary_ms(record.ttft_s for record in good),
        itl_ms=_summary_ms(gap for record in good for gap in record.itls_s),
        tpot_ms=_summary_ms(record.tpot_s for record in good),
        e2el_ms=_summary_ms(record.e2el_s for record in good),
        send_lag_ms=_summary_ms(
            record.sent_s - record.scheduled_s for record in records if record.scheduled_s is not None
        ),
    )


def _summary_ms(values_s: Iterable[float | None]) -> Summary | None:
    return Summary.of(value * 1000 for value in values_s if value is not None)


def concurrency_steps(records: Sequence[RequestRecord]) -> list[tuple[float, int]]:
    """(time in s, requests in flight from then on), at every change."""
    changes = [(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records]
    # Of those at the same time, ends come first.
    changes.sort()
    in_flight = itertools.accumulate(change for _, change in changes)
    return [(time, number) for (time, _), number in zip(changes, in_flight, strict=True)]


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """The most requests that were in flight at a time."""
    return max((number for _, number in concurrency_steps(records)), default=0)

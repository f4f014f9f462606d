"""What a served model counts and measures, with vLLM's names and meanings; see docs/metrics.md.

Values are collected in plain Python, where one costs less than a microsecond, and published from time to
time by `trtforge.runtime.triton.metrics`. Each instrument is written by one thread at a time; any may read.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from trtforge.runtime.outputs import EngineStats
from trtforge.runtime.request import ErrorKind

PREFIX = "trtforge_"

SuccessReason = Literal["stop", "length"]

# Upper ends of buckets; vLLM's, so that its dashboards look the same.
SHORT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
FIRST_TOKEN_S = (*SHORT_S, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
INTER_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
# Ours: vLLM does not measure the parts of a step.
STEP_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    *(5.0, 10.0),
)
STEP_TOKENS = tuple(float(1 << power) for power in range(15))  # 1 to 16384


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a scrape: a name and its labels, beside that of the model."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


class Instrument(Protocol):
    """Something measured, as one or more series."""

    description: str
    is_counter: bool  # else a gauge

    def series(self) -> Sequence[Series]:
        """The series, always the same."""
        ...

    def values(self) -> Sequence[float]:
        """Their values now; to be published in this order."""
        ...


class Gauge:
    """A value that goes up and down."""

    is_counter = False

    def __init__(self, name: str, description: str) -> None:
        self.description = description
        self.value = 0.0
        self._series = (Series(PREFIX + name),)

    def series(self) -> Sequence[Series]:
        return self._series

    def values(self) -> Sequence[float]:
        return (self.value,)


class Counter(Gauge):
    """A sum that only grows. `labels` tell counters of one name apart."""

    is_counter = True

    def __init__(self, name: str, description: str, **labels: str) -> None:
        super().__init__(name, description)
        self._series = (Series(PREFIX + name, labels),)

    def add(self, amount: float = 1.0) -> None:
        """Count `amount` more."""
        self.value += amount


class EngineSum(Counter):
    """A sum that the engine core keeps. The core begins again at 0 when it is restarted; this one goes on."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description)
        self._last = 0

    def follow(self, total: int) -> None:
        """The core's sum is `total` now. One below the last is that of another core, which began at 0."""
        self.value += total - self._last if total >= self._last else total
        self._last = total


class Histogram:
    """How often a value fell into which bucket.

    These are the three series that Prometheus knows as a histogram, as counters. Triton has histograms of
    its own, which take their values one by one, each at the price of a message to the server.
    """

    is_counter = True

    def __init__(self, name: str, description: str, buckets: Sequence[float]) -> None:
        """`buckets`: their upper ends, included; rising."""
        self.description = description
        self._buckets = tuple(buckets)
        self._counts = [0] * (len(self._buckets) + 1)
        self._sum = 0.0
        ends = [*(f"{end:g}" for end in reversed(self._buckets))]
        name = PREFIX + name
        self._series = (
            *(Series(f"{name}_bucket", {"le": end}) for end in ("+Inf", *ends)),
            Series(f"{name}_count"),
            Series(f"{name}_sum"),
        )

    def observe(self, value: float, count: int = 1) -> None:
        """Take `value`, `count` times."""
        self._counts[bisect_left(self._buckets, value)] += count
        self._sum += value * count

    def series(self) -> Sequence[Series]:
        """Buckets from the largest down, so that each holds what is below it at any time of publishing."""
        return self._series

    def values(self) -> Sequence[float]:
        cumulative = list(itertools.accumulate(self._counts.copy()))
        return (*reversed(cumulative), cumulative[-1], self._sum)


class Metrics:
    """All metrics of one served model."""

    def __init__(self) -> None:
        # Before the two that show that the engine is idle: whoever waits for that reads the others then.
        self.kv_cache_usage = Gauge("kv_cache_usage_perc", "Part of the KV cache that is in use, 0 to 1")
        self.kv_cache_free_blocks = Gauge("kv_cache_free_blocks", "KV cache blocks that no request holds")
        self.num_running = Gauge("num_requests_running", "Requests that hold KV cache blocks")
        self.num_waiting = Gauge("num_requests_waiting", "Requests that wait for a place or for blocks")
        self.engine_ready = Gauge("engine_ready", "1 while the engine takes requests")
        self.engine_restarts = Counter("engine_restarts_total", "Times that a dead engine was started again")
        self._sums = {
            name: EngineSum(metric, description)
            for name, metric, description in (
                ("num_preemptions", "num_preemptions_total", "Requests that had to give their blocks back"),
                ("num_prefix_queries", "prefix_cache_queries_total", "Prompt tokens looked up in the cache"),
                ("num_prefix_hits", "prefix_cache_hits_total", "Prompt tokens found in the cache"),
                ("num_swapped_blocks", "swapped_blocks_total", "Blocks moved to host memory"),
                ("num_draft_tokens", "spec_decode_num_draft_tokens_total", "Tokens proposed by speculation"),
                ("num_accepted_tokens", "spec_decode_num_accepted_tokens_total", "Of which accepted"),
            )
        }
        self.step_time = Histogram("step_duration_seconds", "One step of the engine", STEP_S)
        self.executor_time = Histogram("executor_duration_seconds", "Its part in the executor", STEP_S)
        self.scheduler_time = Histogram("scheduler_duration_seconds", "Its part in the scheduler", STEP_S)
        self.step_tokens = Histogram("iteration_tokens_total", "Tokens computed in a step", STEP_TOKENS)

        self.prompt_tokens = Counter("prompt_tokens_total", "Prompt tokens of requests with a first token")
        self.generation_tokens = Counter("generation_tokens_total", "Generated tokens")
        self.time_to_first_token = Histogram(
            "time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN_S
        )
        self.inter_token_latency = Histogram(
            "inter_token_latency_seconds", "From one token to the next", INTER_TOKEN_S
        )
        self.queue_time = Histogram(
            "request_queue_time_seconds", "Waiting to be scheduled for the first time", REQUEST_S
        )
        self.prefill_time = Histogram(
            "request_prefill_time_seconds", "From there to the first token", REQUEST_S
        )
        self.decode_time = Histogram(
            "request_decode_time_seconds", "From the first to the last token", REQUEST_S
        )
        self.e2e_latency = Histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", REQUEST_S
        )
        self.request_prompt_tokens = Histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self.request_generation_tokens = Histogram(
            "request_generation_tokens", "Generated tokens of a request", TOKENS
        )
        self.success: dict[str, Counter] = {
            reason: Counter("request_success_total", "Requests answered in full", finished_reason=reason)
            for reason in get_args(SuccessReason)
        }
        self.failed: dict[str, Counter] = {
            kind: Counter("request_failed_total", "Requests that ended with an error", kind=kind)
            for kind in get_args(ErrorKind)
        }
        self.cancelled = Counter("request_cancelled_total", "Requests whose client gave up")

    def instruments(self) -> list[Instrument]:
        """All of them."""
        found: list[Instrument] = []
        for value in vars(self).values():
            found += value.values() if isinstance(value, dict) else [value]
        return found

    def observe_step(self, stats: EngineStats) -> None:
        """Take the statistics that the engine sends after each step, and when it has started."""
        for name, counter in self._sums.items():
            counter.follow(getattr(stats, name))
        if stats.step_s > 0:
            self.step_time.observe(stats.step_s)
            self.executor_time.observe(stats.executor_s)
            self.scheduler_time.observe(stats.schedule_s)
            self.step_tokens.observe(stats.num_batched_tokens)

    def observe_load(self, stats: EngineStats, *, is_ready: bool, num_restarts: int) -> None:
        """Take how busy the engine is now, and whether it is there at all."""
        if not is_ready:
            stats = EngineStats()
        num_used = stats.num_blocks - stats.num_free_blocks
        self.kv_cache_usage.value = num_used / stats.num_blocks if stats.num_blocks else 0.0
        self.kv_cache_free_blocks.value = stats.num_free_blocks
        self.num_running.value = stats.num_running
        self.num_waiting.value = stats.num_waiting
        self.engine_ready.value = is_ready
        self.engine_restarts.value = num_restarts

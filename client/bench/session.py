"""A whole measurement: warm-up, one run for each load, and the report."""

from __future__ import annotations

import asyncio
import datetime
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trtforge import __version__
from trtforge.client.aio import AsyncClient
from trtforge.client.bench.arrivals import ClosedLoop, Load
from trtforge.client.bench.generate import SendOptions, generate_load
from trtforge.client.bench.machine import describe_machine, git_commit
from trtforge.client.bench.metrics import INTERRUPTED, Objectives, compute_metrics
from trtforge.client.bench.records import RequestRecord
from trtforge.client.bench.report import BenchReport, RunResult
from trtforge.client.bench.server_metrics import Reading, compare, read_metrics
from trtforge.client.bench.workload import WARM_UP, BenchRequest, Workload
from trtforge.errors import RequestError, ServerError


@dataclass(frozen=True, slots=True)
class Session:
    """What to measure. Loads are run one after another, each with prompts of its own."""

    url: str
    model: str
    loads: Sequence[Load]
    workload: Workload
    options: SendOptions
    objectives: Objectives
    num_warmup: int
    metrics_url: str | None

    def measure(self, console: Console) -> tuple[BenchReport, bool]:
        """Run everything; the report, and whether Ctrl-C ended it early.

        Progress is shown on `console`. Raises ConfigError for a workload that cannot be, and RequestError
        or ServerError when the warm-up fails or the metrics cannot be read.
        """
        runs, interrupted = asyncio.run(self._measure(console))
        report = BenchReport(
            created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            trtforge_version=__version__,
            git_commit=git_commit(),
            machine=describe_machine(),
            settings=self._settings(),
            objectives=self.objectives,
            runs=runs,
        )
        return report, interrupted

    async def _measure(self, console: Console) -> tuple[list[RunResult], bool]:
        stop = asyncio.Event()
        results: list[RunResult] = []
        # All of them first: a workload that cannot be is refused before anything is sent.
        requests = [self.workload.requests(number) for number in range(len(self.loads) + 1)]
        with _stop_on_interrupt(stop):
            async with AsyncClient(self.url, self.model) as client:
                await self._warm_up(client, requests[WARM_UP], stop)
                for load, chosen in zip(self.loads, requests[WARM_UP + 1 :], strict=True):
                    if not stop.is_set():
                        results.append(await self._run(client, load, chosen, stop, console))
        return results, stop.is_set()

    async def _warm_up(
        self, client: AsyncClient, requests: Sequence[BenchRequest], stop: asyncio.Event
    ) -> None:
        count = min(self.num_warmup, len(requests))
        if not count:
            return
        records = await generate_load(
            client, requests[:count], ClosedLoop(count), self.options, stop=stop, on_record=lambda _: None
        )
        for record in records:
            if record.error not in (None, INTERRUPTED):
                error = RequestError if record.error == "request" else ServerError
                raise error(f"the warm-up failed: {record.message}")

    async def _run(
        self,
        client: AsyncClient,
        load: Load,
        requests: Sequence[BenchRequest],
        stop: asyncio.Event,
        console: Console,
    ) -> RunResult:
        before = await self._read_metrics()
        cpu_start_s, start_s = time.process_time(), time.perf_counter()
        with _Bar(console, load.label, len(requests)) as bar:
            records = await generate_load(
                client, requests, load, self.options, stop=stop, on_record=bar.advance
            )
        generator_cores = (time.process_time() - cpu_start_s) / (time.perf_counter() - start_s)
        after = await self._read_metrics()
        return RunResult(
            load.label,
            compute_metrics(records, self.objectives),
            records,
            compare(before, after) if before and after else (),
            generator_cores,
        )

    async def _read_metrics(self) -> Reading | None:
        if self.metrics_url is None:
            return None
        return await asyncio.to_thread(read_metrics, self.metrics_url)

    def _settings(self) -> dict[str, str | int | float | bool | None]:
        workload = self.workload
        described: dict[str, str | int | float | bool | None] = {
            "model": self.model,
            "url": self.url,
            "loads": "; ".join(load.label for load in self.loads),
            "requests of each run": workload.num_requests,
            "warm-up requests": self.num_warmup,
            "seed": workload.seed,
        }
        if workload.dataset is None:
            described |= {
                "input length": str(workload.input_length),
                "shared prefix": workload.shared_prefix_tokens,
                "prompts": workload.prompt_form,
                "vocabulary size": workload.vocab_size,
            }
        else:
            described["dataset"] = str(workload.dataset)
        return described | {
            "output length": str(workload.output_length),
            "max model length": workload.max_model_len,
            "ignore end of sequence": self.options.ignore_eos,
            "temperature": self.options.temperature,
            "timeout in s": self.options.timeout_s,
            "objectives": str(self.objectives) or None,
        }


@contextmanager
def _stop_on_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; a second one interrupts as ever."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _Bar:
    """A progress bar of requests that ended, with the rate of output tokens so far."""

    def __init__(self, console: Console, label: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            # Redrawn rarely: drawing takes time of the loop that measures.
            refresh_per_second=2,
        )
        self._task = self._progress.add_task(label, total=total, state="")
        if not console.is_terminal:  # where a bar is drawn only at its end
            console.print(f"{label}: sending {total} requests")
        self._num_tokens = 0
        self._num_failed = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, record: RequestRecord) -> None:
        """One request has ended."""
        self._num_tokens += record.num_output_tokens
        self._num_failed += record.error not in (None, INTERRUPTED)
        state = f"{self._num_tokens / max(record.end_s, 1e-9):,.0f} tokens/s"
        if self._num_failed:
            state += f", [red]{self._num_failed} failed"
        self._progress.update(self._task, advance=1, state=state)

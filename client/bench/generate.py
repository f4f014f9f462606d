"""Sends the requests of a run and records what comes back, in one event loop over one connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trtforge.client.aio import AsyncClient
from trtforge.client.bench.arrivals import ClosedLoop, Load
from trtforge.client.bench.metrics import INTERRUPTED
from trtforge.client.bench.records import RequestRecord, TokenChunk
from trtforge.client.bench.workload import BenchRequest
from trtforge.client.protocol import SamplingOptions
from trtforge.errors import CapacityError, RequestError, ServerError, TrtforgeError

OnRecord = Callable[[RequestRecord], None]

_KINDS: dict[type[TrtforgeError], str] = {
    RequestError: "request",
    CapacityError: "capacity",
    ServerError: "server",
}


@dataclass(frozen=True, slots=True)
class SendOptions:
    """What all requests of a run have in common."""

    ignore_eos: bool
    temperature: float | None
    timeout_s: float | None
    seed: int  # of the arrivals


@dataclass(slots=True)
class _Run:
    client: AsyncClient
    options: SendOptions
    on_record: OnRecord
    start: float = field(default_factory=time.perf_counter)
    records: list[RequestRecord] = field(default_factory=list)

    def now_s(self) -> float:
        return time.perf_counter() - self.start

    async def send(self, request: BenchRequest, scheduled_s: float | None = None) -> None:
        """Send one request and record it, also when it fails or this task is cancelled."""
        sampling = SamplingOptions(
            max_tokens=request.max_tokens,
            temperature=self.options.temperature,
            # Answers are as long as the workload says, else runs could not be compared.
            ignore_eos=self.options.ignore_eos or None,
        )
        chunks: list[TokenChunk] = []
        num_input_tokens, error, message = 0, None, ""
        sent_s = self.now_s()
        try:
            stream = self.client.stream(
                request.prompt.text,
                messages=request.prompt.messages,
                input_ids=request.prompt.input_ids,
                sampling=sampling,
                timeout_s=self.options.timeout_s,
            )
            async with stream:
                async for chunk in stream:
                    # A chunk can be text only, or the end alone: no token, so no time of one.
                    if chunk.token_ids:
                        chunks.append(TokenChunk(self.now_s(), len(chunk.token_ids)))
                    num_input_tokens = chunk.num_input_tokens
            if not chunks:
                error, message = "server", "the answer has no tokens"
        except TrtforgeError as failure:
            error, message = _KINDS.get(type(failure), "server"), str(failure)
        except asyncio.CancelledError:
            error, message = INTERRUPTED, "stopped before its end"
            raise
        finally:
            record = RequestRecord(
                index=request.index,
                scheduled_s=scheduled_s,
                sent_s=sent_s,
                end_s=self.now_s(),
                chunks=tuple(chunks),
                num_input_tokens=num_input_tokens,
                max_tokens=request.max_tokens,
                error=error,
                message=message,
            )
            self.records.append(record)
            self.on_record(record)

    async def send_at_times(self, requests: Sequence[BenchRequest], times_s: Sequence[float]) -> None:
        """Each request at its time, whatever became of those before."""
        async with _TaskGroup() as group:
            for request, scheduled_s in zip(requests, times_s, strict=True):
                await asyncio.sleep(max(0.0, scheduled_s - self.now_s()))
                group.start(asyncio.create_task(self.send(request, scheduled_s)))

    async def send_in_turn(self, requests: Sequence[BenchRequest], concurrency: int) -> None:
        """Always `concurrency` requests in flight, as long as there are so many left."""
        waiting = iter(requests)

        async def user() -> None:
            for request in waiting:
                await self.send(request)

        async with _TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.start(asyncio.create_task(user()))


class _TaskGroup:
    """Tasks that end with their block: awaited at its end, cancelled when it is left by an exception."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, task: asyncio.Task[None]) -> None:
        self._tasks.append(task)

    async def __aenter__(self) -> _TaskGroup:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def generate_load(
    client: AsyncClient,
    requests: Sequence[BenchRequest],
    load: Load,
    options: SendOptions,
    *,
    stop: asyncio.Event,
    on_record: OnRecord,
) -> list[RequestRecord]:
    """Send the requests; the records of those that were sent, in order of their index.

    Setting `stop` cancels those in flight, which are recorded as interrupted, and sends no more.
    `on_record` is called at the end of each request.
    """
    run = _Run(client, options, on_record)
    if isinstance(load, ClosedLoop):
        sending = asyncio.create_task(run.send_in_turn(requests, load.concurrency))
    else:
        times_s = load.arrival_times_s(len(requests), options.seed).tolist()
        sending = asyncio.create_task(run.send_at_times(requests, times_s))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([sending, stopping], return_when=asyncio.FIRST_COMPLETED)
        if sending.done():
            sending.result()
    finally:
        for task in (sending, stopping):
            task.cancel()
        await asyncio.gather(sending, stopping, return_exceptions=True)
    return sorted(run.records, key=lambda record: record.index)

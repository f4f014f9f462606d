"""The requests of the soak test, what each has to give, and the clients that send them."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trtforge.client.aio import AsyncClient, AsyncCompletionStream
from trtforge.client.protocol import SamplingOptions
from trtforge.errors import CapacityError, TrtforgeError
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.request import SamplingParams
from trtforge.runtime.sampling.sampler import Sampler
from trtforge.runtime.sampling.state import SamplingState

REQUEST_TIMEOUT_S = 120.0
REFUSED_PAUSE_S = 0.1
STREAMS_A_CLIENT = 50

Outcome = Literal["completed", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Plan:
    """One request. A cancelled one ends after so many tokens or seconds, unless it is faster."""

    prompt: tuple[int, ...]
    sampling: SamplingOptions
    cancel_after_tokens: int | None = None
    cancel_after_s: float | None = None


@dataclass(slots=True)
class Result:
    """What became of a plan; times are of the monotonic clock."""

    plan: Plan
    outcome: Outcome = "failed"
    token_ids: defaultdict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by answer
    finish_reasons: dict[int, str] = field(default_factory=dict)  # likewise
    error: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0
    problem: str = ""  # something that no kill of the engine explains

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.token_ids.values()))


def make_plans(count: int, vocab_size: int, max_model_len: int, seed: int) -> list[Plan]:
    """Requests of mixed lengths, greedy and sampled; a third share one of a few prefixes, some want two or
    three answers."""
    random = np.random.default_rng(seed)
    prefixes = [tuple(random.integers(0, vocab_size, 48 + 16 * index).tolist()) for index in range(6)]
    plans = []
    for index in range(count):
        prompt = tuple(random.integers(0, vocab_size, int(2 ** random.uniform(0, 7))).tolist())
        if index % 3 == 0:
            prompt = prefixes[int(random.integers(len(prefixes)))] + prompt
        max_tokens = min(int(2 ** random.uniform(0, 6.5)), max_model_len - len(prompt))
        sampling = SamplingOptions(max_tokens=max_tokens)
        if index % 2:
            # Numbers that float32, their type on the wire, holds exactly.
            sampling = SamplingOptions(
                max_tokens=max_tokens,
                temperature=float(random.choice([0.5, 1.0, 1.5])),
                top_k=int(random.choice([0, 20])),
                top_p=float(random.choice([1.0, 0.875])),
                seed=int(random.integers(1 << 62)),
                n=int(random.choice([1, 1, 1, 1, 2, 3])),
            )
        after_tokens = int(random.integers(0, max_tokens + 1)) if index % 16 == 5 else None
        after_s = float(random.uniform(0, 1)) if index % 16 == 12 else None
        plans.append(Plan(prompt, sampling, after_tokens, after_s))
    return plans


class Expectation:
    """What a request gives alone, on an executor of its own with one large block."""

    def __init__(self, vocab_size: int, max_model_len: int) -> None:
        self._executor = FakeExecutor(vocab_size, num_blocks=1, block_size=max_model_len)
        self._sampler = Sampler(vocab_size)

    def first_wrong(self, plan: Plan, index: int, token_ids: list[int]) -> int | None:
        """Index of the first of an answer's tokens that the request alone would not give; None if all are
        right.

        One step computes prompt and answer: the token after a right beginning is the one that a step after
        the other would give, since they see the same history.
        """
        if not token_ids:
            return None
        options = plan.sampling
        params = SamplingParams(
            temperature=options.temperature or 0.0,
            top_k=options.top_k or 0,
            top_p=options.top_p or 1.0,
            seed=None if options.seed is None else options.seed | index << 64,
        )
        tokens = np.array([*plan.prompt, *token_ids[:-1]], dtype=np.int32)
        positions = np.arange(len(tokens), dtype=np.int32)
        inputs = ModelInputs(
            input_ids=tokens,
            position_ids=positions,
            block_tables=np.zeros((1, 1), dtype=np.int32),
            cu_seqlens=np.array([0, len(tokens)], dtype=np.int32),
            context_lens=np.array([len(tokens)], dtype=np.int32),
            slot_mapping=positions,
            logits_indices=positions[len(plan.prompt) - 1 :],
        )
        logits = self._executor.execute(inputs).logits
        num_prompt_tokens = len(plan.prompt)
        state = SamplingState(params, array("i", tokens.tolist()), num_prompt_tokens, frozenset())
        lengths = range(num_prompt_tokens, num_prompt_tokens + len(token_ids))
        expected = self._sampler.sample(logits, [state] * len(token_ids), lengths).token_ids
        wrong = np.flatnonzero(np.array(expected) != np.array(token_ids))
        return int(wrong[0]) if wrong.size else None


class Load:
    """Sends plans, so many at a time, until they or the time have run out."""

    def __init__(self, url: str, plans: list[Plan], concurrency: int, deadline_s: float) -> None:
        self._url = url
        self._plans: Iterator[Plan] = iter(plans)
        self._concurrency = concurrency
        self._deadline_s = deadline_s
        self.results: list[Result] = []
        self.refused_s: list[float] = []  # when a request was told to come again later
        self.num_open = 0

    async def run(self) -> None:
        """Until every request that was sent has ended."""
        clients = [AsyncClient(self._url) for _ in range(-(-self._concurrency // STREAMS_A_CLIENT))]
        workers = [self._work(clients[index % len(clients)]) for index in range(self._concurrency)]
        await asyncio.gather(*workers)
        for client in clients:
            await client.close()

    async def _work(self, client: AsyncClient) -> None:
        for plan in self._plans:
            if time.monotonic() > self._deadline_s:
                return
            self.num_open += 1
            self.results.append(await self._ask(client, plan))
            self.num_open -= 1

    async def _ask(self, client: AsyncClient, plan: Plan) -> Result:
        result = Result(plan, started_s=time.monotonic())
        while True:
            try:
                await self._stream(client, plan, result)
            except CapacityError as error:
                self.refused_s.append(time.monotonic())
                if result.num_tokens:
                    result.problem = f"refused after {result.num_tokens} tokens: {error}"
                    break
                if time.monotonic() > result.started_s + REQUEST_TIMEOUT_S:
                    result.problem = f"still refused after {REQUEST_TIMEOUT_S:.0f} s: {error}"
                    break
                await asyncio.sleep(REFUSED_PAUSE_S)
                continue
            except TrtforgeError as error:
                result.error = str(error)
            break
        result.ended_s = time.monotonic()
        return result

    async def _stream(self, client: AsyncClient, plan: Plan, result: Result) -> None:
        options = plan.sampling
        stream = client.stream(input_ids=plan.prompt, sampling=options, timeout_s=REQUEST_TIMEOUT_S)
        timer = None
        if plan.cancel_after_s is not None:
            timer = asyncio.get_running_loop().call_later(plan.cancel_after_s, stream.close)
        try:
            async with stream:
                await _read(stream, plan, result)
        finally:
            if timer is not None:
                timer.cancel()
        num_answers = plan.sampling.n or 1
        result.outcome = "completed" if len(result.finish_reasons) == num_answers else "cancelled"


async def _read(stream: AsyncCompletionStream, plan: Plan, result: Result) -> None:
    if plan.cancel_after_tokens == 0:
        stream.close()
    async for chunk in stream:
        index = chunk.index
        if index in result.finish_reasons:
            result.problem = "a response came after the last one"
        result.token_ids[index] += chunk.token_ids
        if chunk.finish_reason is not None:
            result.finish_reasons[index] = chunk.finish_reason
        if chunk.num_output_tokens != len(result.token_ids[index]):
            result.problem = f"{len(result.token_ids[index])} tokens arrived of {chunk.num_output_tokens}"
        if plan.cancel_after_tokens is not None and result.num_tokens >= plan.cancel_after_tokens:
            stream.close()

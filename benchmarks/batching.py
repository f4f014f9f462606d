"""Drives an engine core with conversations and with waves of requests, and counts what it does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from traces import Conversation, Request

from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executor import BlockMoves, Executor, KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.request import EngineRequest, SamplingParams


class CountingExecutor:
    """Another executor, and how many tokens it was given."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.num_tokens = 0
        self.num_steps = 0

    def kv_cache_spec(self) -> KVCacheSpec:
        return self._executor.kv_cache_spec()

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        self.num_tokens += len(inputs.input_ids)
        self.num_steps += 1
        return self._executor.execute(inputs)

    def move_blocks(self, moves: BlockMoves) -> None:
        self._executor.move_blocks(moves)

    def close(self) -> None:
        self._executor.close()


@dataclass(slots=True)
class ChatResult:
    """All conversations, to their ends."""

    seconds: float = 0.0
    num_prompt_tokens: int = 0
    num_reusable_tokens: int = 0  # of which earlier requests had put the same prefix into the cache
    num_executed_tokens: int = 0
    num_answer_tokens: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    first_token_s: list[float] = field(default_factory=list)
    answers: dict[str, tuple[int, ...]] = field(default_factory=dict)


class ChatDriver:
    """Users who send their next turn as soon as they have the answer to the last one."""

    def __init__(self, core: EngineCore, executor: CountingExecutor, chats: list[Conversation]) -> None:
        self._core, self._executor, self._chats = core, executor, chats
        self._histories = [chat.system_prompt for chat in chats]
        self._turns = [0] * len(chats)
        self._answers: list[list[int]] = [[] for _ in chats]
        self._sent_s = [0.0] * len(chats)
        self._result = ChatResult()

    def run(self) -> ChatResult:
        """Talk to the end."""
        result, core = self._result, self._core
        tokens_before, before = self._executor.num_tokens, core.stats
        start = time.perf_counter()
        for index in range(len(self._chats)):
            self._send(index)
        while core.has_work():
            for output in core.step():
                self._take(int(output.request_id.split(".")[0]), output.token_ids, output.finish_reason)
        result.seconds = time.perf_counter() - start
        core.check_integrity()
        stats = core.stats
        result.num_executed_tokens = self._executor.num_tokens - tokens_before
        result.num_prefix_queries = stats.num_prefix_queries - before.num_prefix_queries
        result.num_prefix_hits = stats.num_prefix_hits - before.num_prefix_hits
        return result

    def _send(self, index: int) -> None:
        turn = self._turns[index]
        request = self._chats[index].turns[turn]
        history = self._histories[index]
        prompt = history + request.prompt
        self._histories[index] = prompt
        self._answers[index] = []
        self._result.num_prompt_tokens += len(prompt)
        # Not in the cache: a system prompt that nobody has sent yet, and the last token of an answer.
        is_first = turn == 0 and index == 0
        self._result.num_reusable_tokens += 0 if is_first else len(history) - (turn > 0)
        self._sent_s[index] = time.perf_counter()
        sampling = SamplingParams(max_tokens=request.num_answer_tokens, ignore_eos=True)
        self._core.add_request(EngineRequest(f"{index}.{turn}", prompt, sampling))

    def _take(self, index: int, token_ids: tuple[int, ...], finish_reason: str | None) -> None:
        answer = self._answers[index]
        if token_ids and not answer:
            self._result.first_token_s.append(time.perf_counter() - self._sent_s[index])
        answer += token_ids
        if finish_reason is None:
            return
        if finish_reason != "length":
            raise RuntimeError(f"conversation {index} ended with {finish_reason}")
        self._result.answers[f"{index}.{self._turns[index]}"] = tuple(answer)
        self._result.num_answer_tokens += len(answer)
        self._histories[index] += tuple(answer)
        self._turns[index] += 1
        if self._turns[index] < len(self._chats[index].turns):
            self._send(index)


@dataclass(frozen=True, slots=True)
class Spent:
    """What generating took. The processor's time is the fairer one where other work runs as well."""

    seconds: float
    cpu_seconds: float
    num_steps: int


def generate_all(core: EngineCore, executor: CountingExecutor, requests: list[Request]) -> Spent:
    """Until all requests, queued at once, have ended."""
    return generate_in_waves(core, executor, requests, len(requests))


def generate_in_waves(
    core: EngineCore,
    executor: CountingExecutor,
    requests: list[Request],
    batch_size: int,
    *,
    is_padded: bool = False,
) -> Spent:
    """The same where `batch_size` requests start together, and the next ones when all have ended.

    Padded, every sequence of a wave decodes until its longest answer ends, as rows of one tensor do.
    """
    start, cpu_start, steps_before = time.perf_counter(), time.process_time(), executor.num_steps
    for first in range(0, len(requests), batch_size):
        wave = requests[first : first + batch_size]
        max_tokens = [request.num_answer_tokens for request in wave]
        if is_padded:
            max_tokens = [max(max_tokens)] * len(wave)
        for index, (request, count) in enumerate(zip(wave, max_tokens, strict=True)):
            sampling = SamplingParams(max_tokens=count, ignore_eos=True)
            core.add_request(EngineRequest(str(index), request.prompt, sampling))
        num_tokens = 0
        while core.has_work():
            num_tokens += sum(len(output.token_ids) for output in core.step())
        if num_tokens != sum(max_tokens):
            raise RuntimeError(f"{num_tokens} tokens were generated of {sum(max_tokens)}")
    return Spent(
        time.perf_counter() - start, time.process_time() - cpu_start, executor.num_steps - steps_before
    )

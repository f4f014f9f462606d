"""How much of a KV cache holds tokens, step by step: the engine's paged cache, and contiguous ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from traces import Request

from trtforge.manifest import Limits
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.request import EngineRequest, SamplingParams

VOCAB_SIZE = 32


@dataclass(slots=True)
class Occupancy:
    """One scheme over time, an entry a step, in slots of one token."""

    name: str
    num_slots: int
    allocated: list[int] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    num_running: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    num_steps_saturated: int = 0  # the first ones, in which requests waited

    def note(self, allocated: int, filled: int, num_running: int, *, is_saturated: bool) -> None:
        """Remember one step."""
        self.allocated.append(allocated)
        self.filled.append(filled)
        self.num_running.append(num_running)
        if is_saturated:
            self.num_steps_saturated = len(self.filled)

    @property
    def wasted_share(self) -> float:
        """Of all allocated slots of all steps: those without a token."""
        return 1 - sum(self.filled) / sum(self.allocated)

    @property
    def filled_share(self) -> float:
        """Of the whole cache, while requests waited: slots with a token."""
        filled = self.filled[: self.num_steps_saturated]
        return sum(filled) / (len(filled) * self.num_slots)

    @property
    def mean_running(self) -> float:
        """Sequences that run at once while requests wait."""
        running = self.num_running[: self.num_steps_saturated]
        return sum(running) / len(running)


def paged(requests: list[Request], num_slots: int, block_size: int, limits: Limits) -> Occupancy:
    """The engine core on the fake executor, all requests queued at once.

    Read of the scheduler after each step: blocks that sequences hold, tokens that were computed. Prompts
    share nothing, so no block is in two tables.
    """
    num_blocks = num_slots // block_size
    core = EngineCore(FakeExecutor(VOCAB_SIZE, num_blocks, block_size), limits, (), VOCAB_SIZE)
    for index, request in enumerate(requests):
        sampling = SamplingParams(max_tokens=request.num_answer_tokens)
        core.add_request(EngineRequest(str(index), request.prompt, sampling))
    result = Occupancy(f"paged, blocks of {block_size}", num_slots)
    while core.has_work():
        core.step()
        running = core._scheduler.running
        if running:
            allocated = (num_blocks - core.num_free_blocks) * block_size
            filled = sum(sequence.num_computed_tokens for sequence in running)
            result.note(allocated, filled, len(running), is_saturated=core.num_waiting > 0)
    core.check_integrity()
    core.close()
    result.num_preemptions = core.num_preemptions
    return result


@dataclass(slots=True)
class _Reserved:
    """A running sequence of a contiguous cache."""

    num_slots: int
    num_tokens: int
    last_num_tokens: int


def contiguous(
    name: str,
    requests: list[Request],
    num_slots: int,
    limits: Limits,
    reserve: Callable[[Request], int],
) -> Occupancy:
    """The same requests where each keeps `reserve(request)` slots from its start to its end.

    Otherwise as good as can be: inflight batching, first come, first served, no fragmentation, and a prompt
    takes no more than a step.
    """
    waiting = deque(requests)
    running: list[_Reserved] = []
    result = Occupancy(name, num_slots)
    num_free = num_slots
    while waiting or running:
        budget = limits.max_num_batched_tokens - len(running)
        for sequence in running:
            sequence.num_tokens += 1
        while waiting and len(running) < limits.max_num_seqs:
            request = waiting[0]
            slots = reserve(request)
            if slots > num_free or len(request.prompt) > budget:
                break
            waiting.popleft()
            budget -= len(request.prompt)
            num_free -= slots
            # The last token of an answer is never put into the cache.
            last = len(request.prompt) + request.num_answer_tokens - 1
            running.append(_Reserved(slots, len(request.prompt), last))
        num_free += sum(s.num_slots for s in running if s.num_tokens >= s.last_num_tokens)
        running = [s for s in running if s.num_tokens < s.last_num_tokens]
        if running:
            allocated, filled = num_slots - num_free, sum(s.num_tokens for s in running)
            result.note(allocated, filled, len(running), is_saturated=bool(waiting))
    return result

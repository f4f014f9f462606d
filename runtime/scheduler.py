"""Which sequences run in a step, and how many tokens of each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trtforge.errors import ConfigError
from trtforge.runtime.kv_cache_manager import KVCacheManager
from trtforge.runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: which sequences run, in the order their tokens are packed.

    The lists are parallel. `num_scheduled_tokens` counts from a sequence's `num_computed_tokens`.
    """

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]


class Scheduler:
    """First come, first served, within one token budget a step for prefill and decode alike.

    `_running` followed by `_waiting` is always in order of arrival: sequences are admitted from the
    front of `_waiting`, and preemption moves the latest one back there. From this follows:
    - All running sequences decode, except that the last one may be in the middle of its prefill: it
      alone can have exhausted a budget. So decode comes first.
    - Preempted sequences resume before new ones start.
    - The oldest sequence is never preempted by others and is scheduled in every step, so each one
      finishes: nothing starves.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        """Raises ConfigError if the cache can't hold one sequence of `max_model_len` tokens."""
        if kv_cache.max_sequences(max_model_len) < 1:
            raise ConfigError(
                f"one sequence of max_model_len {max_model_len} tokens needs "
                f"{kv_cache.num_blocks_for(max_model_len)} cache blocks, there are "
                f"{kv_cache.num_free_blocks}: lower max_model_len or enlarge the cache"
            )
        self._kv_cache = kv_cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_preemptions = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences not admitted yet or preempted."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """How often a sequence had to give its blocks back before it was finished."""
        return self._num_preemptions

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence of at most `max_model_len` tokens."""
        self._waiting.append(sequence)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's sequences and give them their cache slots."""
        output = SchedulerOutput([], [])
        budget = self._max_num_batched_tokens
        for sequence in self._running:  # preemption shortens it, never by a sequence already passed
            if budget == 0:
                break
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget)
            if not self._make_room(sequence, num_tokens):
                break
            output.sequences.append(sequence)
            output.num_scheduled_tokens.append(num_tokens)
            budget -= num_tokens
        while budget > 0 and self._admit_next():
            sequence = self._running[-1]
            num_tokens = min(len(sequence.token_ids), budget)
            output.sequences.append(sequence)
            output.num_scheduled_tokens.append(num_tokens)
            budget -= num_tokens
        return output

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its status, and free its blocks."""
        if sequence.status == "running":
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._kv_cache.free(sequence)
        sequence.status = "finished"

    def check_integrity(self) -> None:
        """Raise RuntimeError if the cache's bookkeeping or a sequence's status is inconsistent."""
        self._kv_cache.check_integrity(self._running)
        for sequence in self._running:
            if sequence.status != "running":
                raise RuntimeError(f"request {sequence.request_id} runs but is {sequence.status}")
        for sequence in self._waiting:
            if sequence.status not in ("waiting", "preempted") or sequence.block_table:
                raise RuntimeError(
                    f"request {sequence.request_id} waits but is {sequence.status} "
                    f"and holds {len(sequence.block_table)} blocks"
                )

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence its slots; preempt the latest ones, at worst itself, to get them."""
        while not self._kv_cache.allocate_slots(sequence, num_tokens):
            latest = self._running.pop()
            self._kv_cache.free(latest)
            latest.status = "preempted"
            self._num_preemptions += 1
            self._waiting.appendleft(latest)
            if latest is sequence:
                return False
        return True

    def _admit_next(self) -> bool:
        """Start the first waiting sequence, unless that would make preemption likely.

        It gets the blocks of all its known tokens at once: a prefill never stops for want of blocks.
        One more block for every sequence already running is left free, so that they grow by a block
        before a sequence admitted now could be preempted and its prefill wasted.
        """
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return False
        sequence = self._waiting[0]
        num_tokens = len(sequence.token_ids)
        if self._kv_cache.num_blocks_for(num_tokens) + len(self._running) > self._kv_cache.num_free_blocks:
            return False
        self._kv_cache.allocate_slots(sequence, num_tokens)
        sequence.status = "running"
        self._running.append(self._waiting.popleft())
        return True

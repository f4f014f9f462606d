"""Which sequences run in a step, and how many tokens of each."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as SequenceOf

from trtforge.errors import CapacityError
from trtforge.runtime.scheduling.admission import Admission
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheManager
from trtforge.runtime.scheduling.schedule import SchedulerLimits, SchedulerOutput
from trtforge.runtime.scheduling.sequence import Sequence

# Of a step's budget, this part at least goes to prefills that have begun, however many sequences decode.
PREFILL_SHARE = 8
# Prompt tokens of one sequence and step whose logits are all wanted: each is a row of the vocabulary's size.
MAX_PROMPT_LOGPROBS = 256


class Scheduler:
    """One token budget a step for prefill and decode alike; by priority, then first come, first served.

    `_running` and `_waiting` are sorted by `Sequence.order`. Sequences are admitted from the front of
    `_waiting`; the last running one is preempted, be it for want of blocks or for a waiting one of higher
    priority. From this follows:
    - Within a priority preempted sequences resume before new ones start.
    - The first sequence in order is never preempted, and a part of every step is its own while it prefills:
      so each one finishes in its turn, and within a priority nothing starves.

    A prefill that does not fit what is left of a step takes half of it if others could use the rest: a huge
    prompt delays the small ones behind it by a step or two, not by all of its chunks.
    """

    def __init__(self, kv_cache: KVCacheManager, limits: SchedulerLimits) -> None:
        """Raises ConfigError if the cache can't hold one sequence of `max_model_len` tokens."""
        self._kv_cache = kv_cache
        self._limits = limits
        self._admission = Admission(kv_cache, limits)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self.num_preemptions = 0  # so far

    @property
    def running(self) -> SequenceOf[Sequence]:
        """Sequences that hold blocks."""
        return self._running

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences not admitted yet or preempted."""
        return len(self._waiting)

    @property
    def num_answers(self) -> int:
        """Answers that running and waiting sequences stand for."""
        return self._admission.num_answers + sum(sequence.num_answers for sequence in self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence of at most `max_model_len` tokens.

        Raises CapacityError if too many wait, RequestError if its answers can never run together.
        """
        if len(self._waiting) >= self._limits.max_queue_size:
            raise CapacityError(
                f"{len(self._waiting)} requests are waiting, the most that are allowed: send the request "
                "again later, or raise max_queue_size"
            )
        self._admission.check(sequence)
        insort(self._waiting, sequence, key=_order)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step's sequences, give them cache slots, and count their tokens as computed."""
        output = SchedulerOutput()
        num_preemptions = self.num_preemptions
        self._preempt_for_priority(output)
        budget = self._limits.max_num_batched_tokens
        prefills: list[Sequence] = []
        budget -= self._schedule_decodes(output, budget, prefills)
        # Behind the decodes no one is preempted: prefills got all their blocks when they were admitted.
        partial: list[Sequence] = []
        for sequence in prefills:
            if sequence.status == "running":
                budget -= self._schedule_prefill(output, sequence, budget, partial)
        # Nobody is admitted on the blocks of one who had to leave: it would be the same one at times.
        while budget > 0 and self.num_preemptions == num_preemptions:
            admitted = self._admit_next(output)
            if admitted is None:
                break
            budget -= self._schedule_prefill(output, admitted, budget, partial)
        for sequence in partial:  # what the others have left
            if budget == 0:
                break
            budget -= self._extend(output, sequence, budget)
        output.moves = self._kv_cache.take_moves()
        return output

    def fork(self, sequence: Sequence, num_tokens: int) -> None:
        """Start the sequence's followers on its first `num_tokens` tokens, which are computed.

        They get its blocks to share; if it has none any more they wait for blocks of their own.
        """
        followers, sequence.followers = sequence.followers, ()
        if sequence.status == "running":
            for follower in followers:
                self._kv_cache.fork(sequence, follower, num_tokens)
                follower.status = "running"
                insort(self._running, follower, key=_order)
        else:
            for follower in followers:
                follower.status = "preempted"
                insort(self._waiting, follower, key=_order)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its status, and free its blocks."""
        if sequence.status == "running":
            self._running.remove(sequence)
            self._admission.leave(sequence)
        else:
            self._waiting.remove(sequence)
        self._kv_cache.free(sequence)
        sequence.status = "finished"
        self._admission.reconsider()

    def check_integrity(self) -> None:
        """Raise RuntimeError if the cache's bookkeeping or a sequence's status is inconsistent."""
        self._kv_cache.check_integrity([*self._running, *self._waiting])
        for sequence in self._running:
            if sequence.status != "running" or sequence.host_blocks:
                raise RuntimeError(f"request {sequence.request_id} runs but is {sequence.status} or swapped")
        for sequence in self._waiting:
            if sequence.status not in ("waiting", "preempted") or sequence.block_table:
                raise RuntimeError(
                    f"request {sequence.request_id} waits but is {sequence.status} "
                    f"and holds {len(sequence.block_table)} blocks"
                )
        for queue in (self._running, self._waiting):
            if sorted(queue, key=_order) != queue:
                raise RuntimeError("a queue is out of order")
        self._admission.check_integrity(self._running)

    # ------------------------------------------------------------------ one step

    def _schedule_decodes(self, output: SchedulerOutput, budget: int, prefills: list[Sequence]) -> int:
        """One token of each sequence that has no more to compute, and its drafts; returns how many tokens.

        The others are put into `prefills`.
        """
        spent = 0
        prefill_floor = max(1, budget // PREFILL_SHARE)
        kv_cache = self._kv_cache
        has_window = kv_cache.has_window
        append = output.append
        for sequence in self._running:  # preemption shortens the list, from its end
            num_known = len(sequence.token_ids)
            num_tokens = num_known - sequence.num_computed_tokens
            if num_tokens > 1 + sequence.num_draft_tokens:
                # Decodes in front of a prefill in order have all they want; those behind it leave it a part.
                budget = max(spent, budget - min(num_tokens, prefill_floor))
                prefill_floor = 0
                prefills.append(sequence)
                continue
            if num_known >= sequence.max_num_tokens:
                continue  # the step in flight gives its last token
            if spent + num_tokens > budget:
                num_tokens = self._shorten_drafts(sequence, budget - spent)
                if not num_tokens:
                    continue
            if has_window:
                kv_cache.release_behind_window(sequence)
            if sequence.num_computed_tokens + num_tokens > sequence.num_safe_tokens:
                if sequence.num_draft_tokens and not kv_cache.allocate_slots(sequence, num_tokens):
                    num_tokens = self._shorten_drafts(sequence, 1)  # nobody is preempted for a guess
                if not self._make_room(sequence, num_tokens):
                    break
            append(sequence, num_tokens)
            spent += num_tokens
        return spent

    def _schedule_prefill(
        self, output: SchedulerOutput, sequence: Sequence, budget: int, partial: list[Sequence]
    ) -> int:
        """A chunk of a prefill, at most what is left; `partial` gets it if it is not the whole rest."""
        if budget == 0:
            return 0
        num_tokens = len(sequence.token_ids) - sequence.num_computed_tokens
        if sequence.wants_prompt_logprobs:
            num_tokens = min(num_tokens, budget, MAX_PROMPT_LOGPROBS)
        elif num_tokens > budget:
            partial.append(sequence)
            is_alone = sequence is self._running[-1] and not self._waiting
            num_tokens = budget if is_alone else -(-budget // 2)
        self._kv_cache.release_behind_window(sequence)
        output.append(sequence, num_tokens)
        return num_tokens

    def _extend(self, output: SchedulerOutput, sequence: Sequence, budget: int) -> int:
        """Lengthen the chunk of a sequence that is in the step already."""
        index = output.sequences.index(sequence)
        num_tokens = min(budget, len(sequence.token_ids) - sequence.num_computed_tokens)
        output.num_scheduled_tokens[index] += num_tokens
        sequence.num_computed_tokens += num_tokens
        output.samples[index] = sequence.num_computed_tokens == len(sequence.token_ids)
        return num_tokens

    def _shorten_drafts(self, sequence: Sequence, num_tokens: int) -> int:
        """Take drafts back until at most `num_tokens` are to be computed; returns how many are."""
        if num_tokens <= 0:
            sequence.drop_drafts()
            return 0
        num_surplus = len(sequence.token_ids) - sequence.num_computed_tokens - num_tokens
        del sequence.token_ids[len(sequence.token_ids) - num_surplus :]
        sequence.num_draft_tokens -= num_surplus
        return num_tokens

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence its slots; preempt the last ones, at worst itself, to get them."""
        while not self._kv_cache.allocate_slots(sequence, num_tokens):
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt_for_priority(self, output: SchedulerOutput) -> None:
        """Make room for the first waiting sequence at the cost of running ones of lower priority."""
        if not self._waiting or not self._running:
            return
        first = self._waiting[0]
        lower = [sequence for sequence in self._running if sequence.priority > first.priority]
        if not lower or not self._admission.would_fit(first, len(self._running), lower):
            return
        while self._admit_next(output) is None and lower:
            self._preempt(lower.pop())

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._admission.leave(sequence)
        sequence.drop_drafts()
        if not self._limits.swaps or not self._kv_cache.swap_out(sequence):
            self._kv_cache.free(sequence)
        sequence.status = "preempted"
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=_order)

    def _admit_next(self, output: SchedulerOutput) -> Sequence | None:
        """Start the first waiting sequence, if it is admitted."""
        if not self._waiting:
            return None
        sequence = self._waiting[0]
        if not self._admission.admit(sequence, len(self._running)):
            return None
        del self._waiting[0]
        sequence.status = "running"
        insort(self._running, sequence, key=_order)
        output.admitted.append(sequence)
        return sequence


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order

"""Block pool, cache manager and scheduler together, against a naive model of what the cache holds.

The model knows nothing of blocks' owners or prefixes. It keeps, for every slot of every block, the whole
history of tokens that the keys and values written there stand for; whatever the scheduler does with tables,
copies and swaps, a sequence has to find exactly its own history in its slots.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtforge.errors import CapacityError, RequestError
from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheConfig, KVCacheManager
from trtforge.runtime.scheduling.schedule import SchedulerLimits, SchedulerOutput
from trtforge.runtime.scheduling.scheduler import Scheduler
from trtforge.runtime.scheduling.sequence import Sequence

MAX_MODEL_LEN = 20
VOCABULARY = 3  # small, so that prefixes meet
MAX_QUEUE_SIZE = 6

History = tuple[int, ...]


class NaiveCache:
    """The contents of all slots of the cache and of the host's blocks."""

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: list[list[History | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host_blocks: list[list[History | None]] = [[None] * block_size for _ in range(num_host_blocks)]

    def run(self, output: SchedulerOutput, window: int | None) -> None:
        """Move, write, read: as an executor does."""
        for source, target in output.moves.swap_out:
            self.host_blocks[target] = list(self.blocks[source])
        for source, target in output.moves.swap_in:
            self.blocks[target] = list(self.host_blocks[source])
        for source, target in output.moves.copies:
            self.blocks[target] = list(self.blocks[source])
        steps = list(zip(output.sequences, output.starts, output.num_scheduled_tokens, strict=True))
        written = Counter()
        for sequence, start, num_tokens in steps:
            for position in range(start, start + num_tokens):
                block, offset = self.slot(sequence, position)
                self.blocks[block][offset] = tuple(sequence.token_ids[: position + 1])
                written[block, offset] += 1
        assert max(written.values(), default=1) == 1, "two sequences write into one slot"
        for sequence, start, num_tokens in steps:
            end = start + num_tokens
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, end):
                block, offset = self.slot(sequence, position)
                assert self.blocks[block][offset] == tuple(sequence.token_ids[: position + 1])

    def slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size


class SchedulingMachine(RuleBasedStateMachine):
    """Requests arrive, run, fork, draft, finish and are cancelled; priorities and want of blocks preempt."""

    @initialize(
        block_size=st.integers(1, 4),
        num_spare_blocks=st.integers(0, 12),
        num_host_blocks=st.sampled_from([0, 3, 30]),
        prefix_caching=st.booleans(),
        window=st.sampled_from([None, None, 1, 3, 7]),
        max_num_seqs=st.integers(3, 6),
        budget=st.integers(1, 12),
        reserves_blocks=st.booleans(),
        swaps=st.booleans(),
    )
    def build(
        self,
        block_size: int,
        num_spare_blocks: int,
        num_host_blocks: int,
        prefix_caching: bool,
        window: int | None,
        max_num_seqs: int,
        budget: int,
        reserves_blocks: bool,
        swaps: bool,
    ) -> None:
        self.num_blocks = -(-MAX_MODEL_LEN // block_size) + num_spare_blocks
        self.budget, self.max_num_seqs, self.window = budget, max_num_seqs, window
        self.reserves_blocks = reserves_blocks
        config = KVCacheConfig(self.num_blocks, block_size, num_host_blocks, prefix_caching, window)
        self.kv_cache = KVCacheManager(config)
        self.scheduler = Scheduler(
            self.kv_cache,
            SchedulerLimits(MAX_MODEL_LEN, max_num_seqs, budget, MAX_QUEUE_SIZE, reserves_blocks, swaps),
        )
        self.cache = NaiveCache(self.num_blocks, num_host_blocks, block_size)
        self.sequences: list[Sequence] = []
        self.num_arrivals = 0

    # ------------------------------------------------------------------ what can happen

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=MAX_MODEL_LEN - 1),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
        salt=st.sampled_from(["", "", "x"]),
    )
    def arrive(self, prompt: list[int], max_tokens: int, n: int, priority: int, salt: str) -> None:
        self.num_arrivals += 1
        sampling = SamplingParams(max_tokens=max_tokens, n=n)
        request = EngineRequest(str(self.num_arrivals), tuple(prompt), sampling, priority, cache_salt=salt)
        sequence = Sequence.from_request(request, (), MAX_MODEL_LEN, self.num_arrivals)
        num_waiting = self.scheduler.num_waiting
        try:
            self.scheduler.add(sequence)
        except CapacityError:
            assert num_waiting >= MAX_QUEUE_SIZE
        except RequestError:
            assert self.reserves_blocks
        else:
            self.sequences.append(sequence)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        drafts = st.lists(st.integers(0, VOCABULARY - 1), max_size=3)
        for sequence in self.scheduler.running:
            if sequence.num_computed_tokens == len(sequence.token_ids) - 1 and not sequence.followers:
                room = sequence.max_num_tokens - len(sequence.token_ids) - 1
                sequence.propose(data.draw(drafts)[: max(room, 0)])
        urgent = min(self.sequences, key=lambda sequence: sequence.order, default=None)
        output = self.scheduler.schedule()
        assert sum(output.num_scheduled_tokens) <= self.budget
        assert all(num_tokens > 0 for num_tokens in output.num_scheduled_tokens)
        assert len(set(map(id, output.sequences))) == len(output.sequences)
        answers = sum(sequence.num_answers for sequence in self.scheduler.running)
        assert answers <= self.max_num_seqs
        assert urgent is None or urgent in output.sequences, "the first in order gets its part of every step"
        if self.reserves_blocks and not any(sequence.priority for sequence in self.sequences):
            assert self.scheduler.num_preemptions == 0 or self.num_arrivals
        self.cache.run(output, self.window)
        self.land(output, data)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0))
    def cancel(self, index: int) -> None:
        sequence = self.sequences.pop(index % len(self.sequences))
        self.scheduler.finish(sequence)

    def land(self, output: SchedulerOutput, data: st.DataObject) -> None:
        """What the engine core does with a step's results; the model's tokens are drawn."""
        token = st.integers(0, VOCABULARY - 1)
        for sequence, start, num_tokens in zip(
            output.sequences, output.starts, output.num_scheduled_tokens, strict=True
        ):
            end = start + num_tokens
            num_drafts = sequence.num_draft_tokens
            self.kv_cache.cache_full_blocks(sequence, end - num_drafts)
            if end < len(sequence.token_ids):
                continue
            if sequence.followers:
                followers = sequence.followers
                self.scheduler.fork(sequence, end)
                self.sequences += followers
                for follower in followers:
                    self.extend(follower, data.draw(token))
            num_rejected = data.draw(st.integers(0, num_drafts))
            sequence.num_draft_tokens = 0
            if num_rejected:
                del sequence.token_ids[-num_rejected:]
                sequence.num_computed_tokens -= num_rejected
            self.extend(sequence, data.draw(token))

    def extend(self, sequence: Sequence, token: int) -> None:
        sequence.token_ids.append(token)
        if sequence.finish_reason() is not None:
            self.scheduler.finish(sequence)
            self.sequences.remove(sequence)

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def every_block_is_counted(self) -> None:
        self.scheduler.check_integrity()
        owned = {
            block
            for sequence in self.sequences
            for block in sequence.block_table[sequence.num_released_blocks :]
        }
        assert self.kv_cache.num_free_blocks == self.num_blocks - len(owned)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.sequences)
        assert sum(len(sequence.host_blocks) for sequence in self.sequences) <= len(self.cache.host_blocks)

    def teardown(self) -> None:
        """When nothing arrives any more, everybody comes to an end, and nothing is left behind."""
        if not hasattr(self, "scheduler"):
            return
        # The first in order advances in every step, so this many are enough.
        bound = sum(sequence.num_answers * sequence.max_num_tokens for sequence in self.sequences) + 1
        for _ in range(2 * bound):
            if not self.sequences:
                break
            output = self.scheduler.schedule()
            self.cache.run(output, self.window)
            for sequence, start, num_tokens in zip(
                output.sequences, output.starts, output.num_scheduled_tokens, strict=True
            ):
                self.kv_cache.cache_full_blocks(sequence, start + num_tokens)
                if start + num_tokens == len(sequence.token_ids):
                    followers = sequence.followers
                    if followers:
                        self.scheduler.fork(sequence, start + num_tokens)
                        self.sequences += followers
                    for answer in (*followers, sequence):
                        self.extend(answer, 0)
            self.every_block_is_counted()
        assert not self.sequences, "somebody starves"
        assert self.kv_cache.num_free_blocks == self.num_blocks


TestScheduling = SchedulingMachine.TestCase
TestScheduling.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

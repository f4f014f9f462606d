from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtforge.errors import CapacityError
from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduling.block_pool import BlockPool
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheConfig, KVCacheManager
from trtforge.runtime.scheduling.sequence import Sequence


def new_sequence(request_id: str = "a") -> Sequence:
    return Sequence.from_request(EngineRequest(request_id, (1,), SamplingParams()), (), 1000)


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(CapacityError, match="4 blocks wanted, 3 of 4 are free"):
        pool.allocate(4)
    assert pool.num_free_blocks == 3
    assert len(set(pool.allocate(3))) == 3
    pool.check_integrity()


def test_a_block_cannot_be_freed_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(RuntimeError, match="no owner"):
        pool.free(blocks)
    pool.check_integrity()


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 5), (4, 5), (5, 2), (8, 2), (9, 1), (20, 1), (21, 0)]
)
def test_how_many_sequences_fit(num_tokens: int, expected: int) -> None:
    kv_cache = KVCacheManager(KVCacheConfig(num_blocks=5, block_size=4))
    assert kv_cache.max_sequences(num_tokens) == expected
    sequences = [new_sequence() for _ in range(expected + 1)]
    assert [kv_cache.allocate_slots(s, num_tokens) for s in sequences] == [True] * expected + [False]


def test_integrity_check_finds_lost_and_doubly_owned_blocks() -> None:
    kv_cache = KVCacheManager(KVCacheConfig(num_blocks=5, block_size=4))
    first, second = new_sequence("first"), new_sequence("second")
    kv_cache.allocate_slots(first, 8)
    kv_cache.allocate_slots(second, 4)
    kv_cache.check_integrity([first, second])
    with pytest.raises(RuntimeError, match="is in 0 block tables but has 1 owners"):
        kv_cache.check_integrity([first])
    second.block_table.append(first.block_table[0])
    with pytest.raises(RuntimeError, match="is in 2 block tables but has 1 owners"):
        kv_cache.check_integrity([first, second])
    second.block_table.pop()
    second.num_computed_tokens = 5
    with pytest.raises(RuntimeError, match="5 computed tokens do not fit its 1 blocks"):
        kv_cache.check_integrity([first, second])


class KVCacheMachine(RuleBasedStateMachine):
    """Sequences grow and are freed at random; the model is the number of tokens of each."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.kv_cache = KVCacheManager(KVCacheConfig(num_blocks, block_size))
        self.sequences: list[Sequence] = []

    def blocks_used(self) -> int:
        return sum(-(-s.num_computed_tokens // self.block_size) for s in self.sequences)

    @rule(num_tokens=st.integers(1, 20))
    def start(self, num_tokens: int) -> None:
        self.sequences.append(new_sequence())
        self.grow(len(self.sequences) - 1, num_tokens)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0), num_tokens=st.integers(1, 20))
    def grow(self, index: int, num_tokens: int) -> None:
        sequence = self.sequences[index % len(self.sequences)]
        before = list(sequence.block_table)
        total = sequence.num_computed_tokens + num_tokens
        num_missing = -(-total // self.block_size) - len(before)
        fits = num_missing <= self.num_blocks - self.blocks_used()
        assert self.kv_cache.allocate_slots(sequence, num_tokens) == fits
        assert list(sequence.block_table[: len(before)]) == before
        if fits:
            sequence.num_computed_tokens = total
        else:
            assert len(sequence.block_table) == len(before)

    @precondition(lambda self: self.sequences)
    @rule(index=st.integers(0))
    def free(self, index: int) -> None:
        sequence = self.sequences.pop(index % len(self.sequences))
        self.kv_cache.free(sequence)
        assert not sequence.block_table
        assert sequence.num_computed_tokens == 0

    @invariant()
    def no_block_is_lost_or_shared(self) -> None:
        self.kv_cache.check_integrity(self.sequences)
        assert self.kv_cache.num_free_blocks == self.num_blocks - self.blocks_used()


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

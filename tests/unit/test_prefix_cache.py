from __future__ import annotations

import pytest

from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheConfig, KVCacheManager
from trtforge.runtime.scheduling.prefix_cache import PrefixCache
from trtforge.runtime.scheduling.sequence import Sequence

BLOCK_SIZE = 4


def new_sequence(tokens: range | list[int], salt: str = "", **sampling: int) -> Sequence:
    request = EngineRequest("a", tuple(tokens), SamplingParams(**sampling), cache_salt=salt)
    return Sequence.from_request(request, (), 1000)


def new_manager(num_blocks: int = 8, **config: object) -> KVCacheManager:
    return KVCacheManager(KVCacheConfig(num_blocks, BLOCK_SIZE, **config))  # type: ignore[arg-type]


def compute(manager: KVCacheManager, sequence: Sequence) -> int:
    """Admit and compute the whole sequence; returns how many tokens were cached."""
    assert manager.admit(sequence, 0)
    num_cached = sequence.num_computed_tokens
    sequence.status = "running"
    sequence.num_computed_tokens = len(sequence.token_ids)
    manager.cache_full_blocks(sequence, len(sequence.token_ids))
    return num_cached


def test_contents_are_compared_and_not_their_hashes() -> None:
    class Colliding(bytes):
        def __hash__(self) -> int:
            return 1

    cache = PrefixCache()
    first = cache.insert("", Colliding(b"aaaa"), 1)
    other = cache.insert("", Colliding(b"bbbb"), 2)
    assert first != other
    assert cache.find("", Colliding(b"aaaa")) == (1, first)
    assert cache.find("", Colliding(b"cccc")) is None
    # The same tokens behind another content are another content.
    assert cache.insert(first, Colliding(b"cccc"), 3) != cache.insert(other, Colliding(b"cccc"), 4)


@pytest.mark.parametrize(
    ("num_tokens", "num_shared", "expected"),
    [(12, 12, 8), (13, 13, 12), (12, 7, 4), (12, 3, 0), (4, 4, 0), (5, 5, 4)],
)
def test_whole_blocks_are_found_and_one_token_is_left_to_compute(
    num_tokens: int, num_shared: int, expected: int
) -> None:
    manager = new_manager()
    first = new_sequence(range(num_tokens))
    assert compute(manager, first) == 0
    second = new_sequence([*range(num_shared), *range(100, 100 + num_tokens - num_shared)])
    assert compute(manager, second) == expected
    num_shared_blocks = expected // BLOCK_SIZE
    assert first.block_table[:num_shared_blocks] == second.block_table[:num_shared_blocks]
    assert not set(first.block_table[num_shared_blocks:]) & set(second.block_table[num_shared_blocks:])
    manager.check_integrity([first, second])


def test_salts_do_not_share() -> None:
    manager = new_manager()
    for salt in ("", "x", "y"):
        sequence = new_sequence(range(9), salt)
        assert compute(manager, sequence) == 0
        manager.free(sequence)
    assert compute(manager, new_sequence(range(9), "x")) == 8


@pytest.mark.parametrize(("start", "expected"), [(0, 4), (100, 8)])
def test_freed_prefixes_are_evicted_oldest_first_and_from_their_end(start: int, expected: int) -> None:
    manager = new_manager(num_blocks=6)
    for first_token in (0, 100):
        sequence = new_sequence(range(first_token, first_token + 9))
        compute(manager, sequence)
        manager.free(sequence)
    assert (manager.num_free_blocks, manager.num_cached_blocks) == (6, 4)
    # Two blocks are empty; the third is the end of the older prefix.
    compute(manager, new_sequence(range(200, 212)))
    assert compute(manager, new_sequence(range(start, start + 9))) == expected


def test_no_prefix_is_used_by_requests_that_want_logprobs_of_it() -> None:
    manager = new_manager()
    compute(manager, new_sequence(range(9)))
    assert compute(manager, new_sequence(range(9), prompt_logprobs=0)) == 0


def test_a_cached_block_that_a_fork_fills_in_another_way_is_forgotten() -> None:
    manager = new_manager()
    first = new_sequence(range(6), n=2)
    assert compute(manager, first) == 0
    (second,) = first.followers
    manager.fork(first, second, 6)
    # The first one fills the shared block without a copy: it was scheduled before the fork.
    first.token_ids.extend([6, 7])
    first.num_computed_tokens = 8
    manager.cache_full_blocks(first, 8)
    manager.free(first)
    assert manager.allocate_slots(second, 1)
    assert not manager.take_moves().copies
    second.token_ids.append(50)
    third = new_sequence(range(9))
    assert compute(manager, third) == 4
    manager.check_integrity([second, third])


def test_a_shared_block_is_copied_before_it_is_appended_to() -> None:
    manager = new_manager()
    first = new_sequence(range(6), n=3)
    compute(manager, first)
    first.num_computed_tokens = 6
    answers = [first, *first.followers]
    for follower in first.followers:
        manager.fork(first, follower, 6)
    assert manager.num_free_blocks == 6
    shared = first.block_table[1]
    for answer in answers:
        assert manager.allocate_slots(answer, 1)
    copies = manager.take_moves().copies
    assert [source for source, _ in copies] == [shared, shared]
    assert len({answer.block_table[1] for answer in answers}) == 3
    assert len({answer.block_table[0] for answer in answers}) == 1
    manager.check_integrity(answers)


def test_blocks_behind_the_window_are_given_back() -> None:
    manager = new_manager(window=5)
    sequence = new_sequence(range(12))
    compute(manager, sequence)
    manager.release_behind_window(sequence)  # the token at 12 sees 8 to 12
    assert (sequence.num_released_blocks, manager.num_free_blocks) == (2, 7)
    manager.check_integrity([sequence])
    manager.free(sequence)
    assert manager.num_free_blocks == 8
    manager.check_integrity([])


def test_swapping_is_bounded_by_the_host_blocks() -> None:
    manager = new_manager(num_host_blocks=3)
    first, second = new_sequence(range(8)), new_sequence(range(100, 108))
    for sequence in (first, second):
        compute(manager, sequence)
    table = list(first.block_table)
    assert manager.swap_out(first)
    assert not manager.swap_out(second)
    assert manager.take_moves().swap_out == list(zip(table, first.host_blocks, strict=True))
    manager.check_integrity([first, second])
    host_blocks = list(first.host_blocks)
    assert manager.admit(first, 0)
    assert first.num_computed_tokens == 8
    assert manager.take_moves().swap_in == list(zip(host_blocks, first.block_table, strict=True))
    assert manager.swap_out(second)
    manager.check_integrity([first, second])

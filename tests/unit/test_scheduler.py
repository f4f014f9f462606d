from __future__ import annotations

from typing import Any

import pytest

from trtforge.errors import CapacityError, ConfigError, RequestError
from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheConfig, KVCacheManager
from trtforge.runtime.scheduling.schedule import SchedulerLimits, SchedulerOutput
from trtforge.runtime.scheduling.scheduler import Scheduler
from trtforge.runtime.scheduling.sequence import Sequence

MAX_MODEL_LEN = 24


class Arrivals:
    """Sequences in the order in which they were made."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, request_id: str, num_prompt_tokens: int, max_tokens: int, **options: Any) -> Sequence:
        self.number += 1
        priority = options.pop("priority", 0)
        prompt = tuple(range(self.number * 1000, self.number * 1000 + num_prompt_tokens))
        sampling = SamplingParams(max_tokens=max_tokens, **options)
        request = EngineRequest(request_id, prompt, sampling, priority)
        return Sequence.from_request(request, (), MAX_MODEL_LEN, self.number)


@pytest.fixture
def new() -> Arrivals:
    return Arrivals()


def new_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 100,
    num_host_blocks: int = 0,
    **limits: Any,
) -> Scheduler:
    return Scheduler(
        KVCacheManager(KVCacheConfig(num_blocks, block_size, num_host_blocks)),
        SchedulerLimits(MAX_MODEL_LEN, max_num_seqs, budget, **limits),
    )


def run_step(scheduler: Scheduler) -> tuple[SchedulerOutput, list[tuple[str, int]]]:
    """One step with a model that always says 1; returns the schedule, also as (id, tokens) pairs."""
    output = scheduler.schedule()
    for sequence in output.sequences:
        if sequence.num_computed_tokens == len(sequence.token_ids):
            sequence.token_ids.append(1)
            if sequence.finish_reason() is not None:
                scheduler.finish(sequence)
    scheduler.check_integrity()
    pairs = [(s.request_id, n) for s, n in zip(output.sequences, output.num_scheduled_tokens, strict=True)]
    return output, pairs


def test_a_cache_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len 24 tokens needs 6 cache blocks, there are 5"):
        new_scheduler(num_blocks=5, max_num_seqs=1, budget=1)
    new_scheduler(num_blocks=6, max_num_seqs=1, budget=1)


def test_prefill_is_chunked_behind_decodes_within_one_budget(new: Arrivals) -> None:
    scheduler = new_scheduler(budget=5)
    scheduler.add(new("a", 3, 10))
    scheduler.add(new("b", 9, 10))
    assert run_step(scheduler)[1] == [("a", 3), ("b", 2)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 4)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 3)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 1)]


def test_a_huge_prompt_leaves_half_of_what_it_cannot_use_at_once(new: Arrivals) -> None:
    scheduler = new_scheduler(budget=8)
    scheduler.add(new("huge", 20, 2))
    scheduler.add(new("small", 3, 3))
    scheduler.add(new("large", 9, 2))
    # What small does not need goes to large, and what nobody needs back to huge.
    assert run_step(scheduler)[1] == [("huge", 4), ("small", 3), ("large", 1)]
    assert run_step(scheduler)[1] == [("small", 1), ("huge", 4), ("large", 3)]
    assert run_step(scheduler)[1] == [("small", 1), ("huge", 4), ("large", 3)]
    assert run_step(scheduler)[1] == [("huge", 8)]


def test_decodes_leave_a_part_of_each_step_to_a_prefill_before_them(new: Arrivals) -> None:
    scheduler = new_scheduler(budget=4)
    scheduler.add(new("huge", 20, 1))
    for name in "abcd":
        scheduler.add(new(name, 1, 20))
    chunks = []
    while not chunks or chunks[-1]:
        chunks.append(dict(run_step(scheduler)[1]).get("huge", 0))
    assert all(chunks[:-1]), "the oldest is in every step"
    assert sum(chunks) == 20


def test_max_num_seqs_bounds_admission(new: Arrivals) -> None:
    scheduler = new_scheduler(max_num_seqs=2)
    for request_id in "abc":
        scheduler.add(new(request_id, 1, 2))
    assert run_step(scheduler)[1] == [("a", 1), ("b", 1)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 1)]
    assert run_step(scheduler)[1] == [("c", 1)]


def test_the_latest_is_preempted_and_resumes_before_newcomers_with_its_tokens(new: Arrivals) -> None:
    # Six blocks of four: a and b fill three each, then a needs a fourth.
    scheduler = new_scheduler(num_blocks=6)
    first, second = new("a", 8, 16), new("b", 6, 10)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(5):
        run_step(scheduler)
    assert scheduler.num_running == 2
    scheduler.add(new("c", 1, 1))

    assert run_step(scheduler)[1] == [("a", 1)]
    assert second.status == "preempted"
    assert second.num_generated_tokens == 5
    assert not second.block_table
    while first.status != "finished":
        # Room for the newcomer alone would be there; the preempted one comes first.
        assert run_step(scheduler)[1] == [("a", 1)]
    assert run_step(scheduler)[1] == [("b", 11), ("c", 1)]
    assert second.num_generated_tokens == 6


def test_a_swapped_sequence_goes_on_where_it_was(new: Arrivals) -> None:
    scheduler = new_scheduler(num_blocks=6, num_host_blocks=3, swaps=True)
    first, second = new("a", 8, 16), new("b", 6, 10)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(5):
        run_step(scheduler)
    table = list(second.block_table)
    output, pairs = run_step(scheduler)
    assert pairs == [("a", 1)]
    assert [block for block, _ in output.moves.swap_out] == table
    while first.status != "finished":
        run_step(scheduler)
    output, pairs = run_step(scheduler)
    assert pairs == [("b", 1)]
    assert len(output.moves.swap_in) == 3


def test_admission_leaves_running_sequences_a_block_to_grow(new: Arrivals) -> None:
    scheduler = new_scheduler(num_blocks=6)
    scheduler.add(new("a", 5, 5))  # two blocks; the last step needs a third
    run_step(scheduler)
    # Four blocks are free, and b needs four: it would be preempted for the sake of a.
    scheduler.add(new("b", 16, 1))
    for _ in range(4):
        assert run_step(scheduler)[1] == [("a", 1)]
    assert run_step(scheduler)[1] == [("b", 16)]


def test_guaranteed_no_evict_admits_only_what_can_run_to_its_end(new: Arrivals) -> None:
    scheduler = new_scheduler(num_blocks=9, reserves_blocks=True)
    for name in "abc":  # three blocks each come to be four
        scheduler.add(new(name, 9, 7))
    started = [run_step(scheduler)[1] for _ in range(7)]
    assert started[0] == [("a", 9), ("b", 9)]
    assert run_step(scheduler)[1] == [("c", 9)]
    assert scheduler.num_preemptions == 0
    with pytest.raises(RequestError, match="can come to need 12 cache blocks, there are 9"):
        scheduler.add(new("d", 9, 7, n=3))


def test_a_higher_priority_goes_first_and_takes_the_place_of_a_lower_one(new: Arrivals) -> None:
    scheduler = new_scheduler(max_num_seqs=2)
    for name, priority in (("low", 5), ("middle", 2), ("lower", 6)):
        scheduler.add(new(name, 4, 4, priority=priority))
    assert run_step(scheduler)[1] == [("middle", 4), ("low", 4)]
    scheduler.add(new("high", 4, 2, priority=-1))
    assert run_step(scheduler)[1] == [("middle", 1), ("high", 4)]
    scheduler.add(new("same", 4, 2, priority=2))  # no higher than the lowest that runs
    assert run_step(scheduler)[1] == [("high", 1), ("middle", 1)]
    # Within a priority the earlier arrival first.
    assert run_step(scheduler)[1] == [("middle", 1), ("same", 4)]
    assert run_step(scheduler)[1] == [("same", 1), ("low", 5)]


def test_nobody_is_preempted_for_a_priority_that_would_not_fit_all_the_same(new: Arrivals) -> None:
    scheduler = new_scheduler(num_blocks=8, max_num_seqs=4)
    scheduler.add(new("same", 12, 8, priority=0))
    scheduler.add(new("low", 4, 8, priority=1))
    run_step(scheduler)
    scheduler.add(new("huge", 20, 1, priority=0))
    assert run_step(scheduler)[1] == [("same", 1), ("low", 1)]
    assert scheduler.num_preemptions == 0


def test_the_queue_is_bounded_and_says_so(new: Arrivals) -> None:
    scheduler = new_scheduler(max_num_seqs=1, max_queue_size=2)
    scheduler.add(new("a", 1, 5))
    run_step(scheduler)
    scheduler.add(new("b", 1, 5))
    scheduler.add(new("c", 1, 5))
    with pytest.raises(CapacityError, match="2 requests are waiting, the most that are allowed"):
        scheduler.add(new("d", 1, 5))
    with pytest.raises(RequestError, match="n is 2: this model runs at most 1 answers at once"):
        new_scheduler(max_num_seqs=1).add(new("e", 1, 5, n=2))


def test_drafts_never_cost_another_sequence_its_blocks(new: Arrivals) -> None:
    scheduler = new_scheduler(num_blocks=6)
    first, second = new("a", 7, 9), new("b", 8, 9)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    scheduler.add(new("c", 4, 4))
    run_step(scheduler)
    # Every block is taken: the drafts would need one more.
    first.propose([5, 5, 5, 5, 5])
    _, pairs = run_step(scheduler)
    assert dict(pairs)["a"] in (1, 4)
    assert scheduler.num_preemptions == 0

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.errors import ConfigError
from trtforge.runtime.kv_cache_manager import KVCacheManager
from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduler import Scheduler, SchedulerOutput
from trtforge.runtime.sequence import Sequence

MAX_MODEL_LEN = 24


def new_sequence(request_id: str, num_prompt_tokens: int, max_tokens: int) -> Sequence:
    request = EngineRequest(request_id, (1,) * num_prompt_tokens, SamplingParams(max_tokens=max_tokens))
    return Sequence.from_request(request, (), MAX_MODEL_LEN)


def new_scheduler(num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> Scheduler:
    return Scheduler(
        KVCacheManager(num_blocks, block_size),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )


def run_step(scheduler: Scheduler) -> tuple[SchedulerOutput, list[tuple[str, int]]]:
    """One step with a model that always says 1; returns the schedule, also as (id, tokens) pairs."""
    output = scheduler.schedule()
    for sequence, num_tokens in zip(output.sequences, output.num_scheduled_tokens, strict=True):
        if sequence.advance(num_tokens):
            sequence.token_ids.append(1)
            if sequence.finish_reason() is not None:
                scheduler.finish(sequence)
    scheduler.check_integrity()
    pairs = [(s.request_id, n) for s, n in zip(output.sequences, output.num_scheduled_tokens, strict=True)]
    return output, pairs


def test_a_cache_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len 24 tokens needs 6 cache blocks, there are 5"):
        new_scheduler(num_blocks=5, block_size=4, max_num_seqs=1, budget=1)
    new_scheduler(num_blocks=6, block_size=4, max_num_seqs=1, budget=1)


def test_prefill_is_chunked_behind_decodes_within_one_budget() -> None:
    scheduler = new_scheduler(num_blocks=100, block_size=4, max_num_seqs=8, budget=5)
    scheduler.add(new_sequence("a", 3, 10))
    scheduler.add(new_sequence("b", 9, 10))
    scheduler.add(new_sequence("c", 2, 10))
    assert run_step(scheduler)[1] == [("a", 3), ("b", 2)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 4)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 3), ("c", 1)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 1), ("c", 1)]


def test_max_num_seqs_bounds_admission() -> None:
    scheduler = new_scheduler(num_blocks=100, block_size=4, max_num_seqs=2, budget=100)
    for request_id in "abc":
        scheduler.add(new_sequence(request_id, 1, 2))
    assert run_step(scheduler)[1] == [("a", 1), ("b", 1)]
    assert run_step(scheduler)[1] == [("a", 1), ("b", 1)]
    assert run_step(scheduler)[1] == [("c", 1)]


def test_the_latest_is_preempted_and_resumes_before_newcomers_with_its_tokens() -> None:
    # Six blocks of four: a and b fill three each, then a needs a fourth.
    scheduler = new_scheduler(num_blocks=6, block_size=4, max_num_seqs=8, budget=100)
    first, second = new_sequence("a", 8, 16), new_sequence("b", 6, 10)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(5):
        run_step(scheduler)
    assert scheduler.num_running == 2
    scheduler.add(new_sequence("c", 1, 1))

    assert run_step(scheduler)[1] == [("a", 1)]
    assert second.status == "preempted"
    assert second.num_generated_tokens == 5
    assert not second.block_table
    while first.status != "finished":
        # Room for the newcomer alone would be there; the preempted one comes first.
        assert run_step(scheduler)[1] == [("a", 1)]
    assert run_step(scheduler)[1] == [("b", 11), ("c", 1)]
    assert second.num_generated_tokens == 6


def test_admission_leaves_running_sequences_a_block_to_grow() -> None:
    scheduler = new_scheduler(num_blocks=6, block_size=4, max_num_seqs=8, budget=100)
    scheduler.add(new_sequence("a", 5, 5))  # two blocks; the last step needs a third
    run_step(scheduler)
    # Four blocks are free, and b needs four: it would be preempted for the sake of a.
    scheduler.add(new_sequence("b", 16, 1))
    for _ in range(4):
        assert run_step(scheduler)[1] == [("a", 1)]
    assert run_step(scheduler)[1] == [("b", 16)]


@st.composite
def loads(draw: st.DrawFn) -> dict[str, object]:
    block_size = draw(st.integers(1, 6))
    smallest = -(-MAX_MODEL_LEN // block_size)
    lengths = st.tuples(st.integers(1, MAX_MODEL_LEN - 1), st.integers(1, MAX_MODEL_LEN))
    return {
        "block_size": block_size,
        "num_blocks": draw(st.integers(smallest, 3 * smallest)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "budget": draw(st.integers(1, 30)),
        # Requests that arrive before each of the first steps.
        "arrivals": draw(st.lists(st.lists(lengths, max_size=4), min_size=1, max_size=12)),
    }


@settings(max_examples=200, deadline=None)
@given(loads())
def test_every_step_keeps_the_rules_and_every_sequence_finishes(load: dict[str, object]) -> None:
    arrivals = load.pop("arrivals")
    scheduler = new_scheduler(**load)
    sequences: list[Sequence] = []
    step = 0
    # The oldest sequence advances in every step, so this many steps are enough for all.
    max_steps = len(arrivals) + sum(sum(lengths) for batch in arrivals for lengths in batch)
    while step < len(arrivals) or scheduler.num_running + scheduler.num_waiting:
        for num_prompt_tokens, max_tokens in arrivals[step] if step < len(arrivals) else ():
            sequences.append(new_sequence(str(len(sequences)), num_prompt_tokens, max_tokens))
            scheduler.add(sequences[-1])
        unfinished = [s for s in sequences if s.status != "finished"]
        decoding = [s.request_id for s in unfinished if s.num_computed_tokens == len(s.token_ids) - 1 > 0]
        output, pairs = run_step(scheduler)
        step += 1

        assert step <= max_steps
        assert sum(output.num_scheduled_tokens) <= load["budget"]
        assert all(num_tokens > 0 for _, num_tokens in pairs)
        assert len(output.sequences) <= load["max_num_seqs"]
        assert scheduler.num_running <= load["max_num_seqs"]
        assert output.sequences[:1] == unfinished[:1], "the oldest is always served"
        # Decode first, then prefill, each in order of arrival, and so is who runs and who waits.
        is_decode = [request_id in decoding for request_id, _ in pairs]
        assert is_decode == sorted(is_decode, reverse=True)
        order = [int(request_id) for request_id, _ in pairs]
        assert order == sorted(order)
        statuses = [s.status == "running" for s in sequences if s.status != "finished"]
        assert statuses == sorted(statuses, reverse=True)
    for sequence in sequences:
        assert len(sequence.token_ids) == sequence.max_num_tokens

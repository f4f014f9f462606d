from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.runtime.engine.model_inputs import build_model_inputs
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduling.schedule import SchedulerOutput
from trtforge.runtime.scheduling.sequence import Sequence

VOCAB_SIZE = 50
# (num_computed_tokens, num_scheduled_tokens, known tokens after those)
Lengths = tuple[int, int, int]


def schedule(lengths: list[Lengths], block_size: int, seed: int = 0) -> SchedulerOutput:
    """Sequences with random tokens over randomly permuted blocks."""
    rng = np.random.default_rng(seed)
    num_blocks = sum(-(-sum(each) // block_size) for each in lengths)
    blocks = rng.permutation(num_blocks).tolist()
    sequences = []
    for num_computed, num_new, num_later in lengths:
        num_tokens = num_computed + num_new + num_later
        tokens = rng.integers(VOCAB_SIZE, size=num_tokens).tolist()
        sequence = Sequence.from_request(EngineRequest("a", tuple(tokens), SamplingParams()), (), 1000)
        sequence.block_table = array("i", [blocks.pop() for _ in range(-(-num_tokens // block_size))])
        sequences.append(sequence)
    starts = [num_computed for num_computed, _, _ in lengths]
    return SchedulerOutput(sequences, starts, [num_new for _, num_new, _ in lengths])


def naive_inputs(output: SchedulerOutput, block_size: int) -> dict[str, list]:
    """Token by token, from the definitions in trtforge.wire."""
    inputs: dict[str, list] = {name: [] for name in ModelInputs.__slots__}
    inputs["cu_seqlens"].append(0)
    width = max(len(sequence.block_table) for sequence in output.sequences)
    for sequence, start, num_new in zip(
        output.sequences, output.starts, output.num_scheduled_tokens, strict=True
    ):
        for position in range(start, start + num_new):
            inputs["input_ids"].append(sequence.token_ids[position])
            inputs["position_ids"].append(position)
            block = sequence.block_table[position // block_size]
            inputs["slot_mapping"].append(block * block_size + position % block_size)
        inputs["block_tables"].append(
            [*sequence.block_table] + [0] * (width - len(sequence.block_table)),
        )
        inputs["context_lens"].append(start + num_new)
        inputs["cu_seqlens"].append(len(inputs["input_ids"]))
        end = len(inputs["input_ids"])
        wants_all = sequence.sampling.prompt_logprobs is not None
        num_rows = num_new if wants_all else 1 + sequence.num_draft_tokens
        inputs["logits_indices"] += range(end - num_rows, end)
    return inputs


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=8),
    st.integers(1, 17),
)
def test_arrays_equal_the_token_by_token_definition(lengths: list[Lengths], block_size: int) -> None:
    output = schedule(lengths, block_size)
    inputs = build_model_inputs(output, block_size)
    for name, expected in naive_inputs(output, block_size).items():
        array_ = getattr(inputs, name)
        assert array_.dtype == np.int32, name
        assert array_.flags.c_contiguous, name
        assert array_.flags.writeable, name
        assert array_.tolist() == expected, name


def test_logits_of_drafts_and_prompts_are_asked_for_too() -> None:
    output = schedule([(5, 1, 0), (0, 6, 4), (9, 4, 0), (2, 2, 1)], 4)
    prompt, drafting = output.sequences[1:3]
    prompt.sampling = SamplingParams(prompt_logprobs=1)
    drafting.num_draft_tokens = 3
    output.is_plain = False
    assert build_model_inputs(output, 4).logits_indices.tolist() == naive_inputs(output, 4)["logits_indices"]


# The fake executor has to notice each kind of wrong input, or tests that trust it prove little.

BLOCK_SIZE = 4


def prefilled() -> tuple[FakeExecutor, ModelInputs]:
    """An executor that holds three histories, and the inputs of the next step over them."""
    output = schedule([(5, 1, 0), (9, 3, 0), (2, 2, 1)], BLOCK_SIZE)
    executor = FakeExecutor(VOCAB_SIZE, num_blocks=16, block_size=BLOCK_SIZE)
    before = SchedulerOutput(output.sequences, [0] * len(output.starts), output.starts)
    executor.execute(build_model_inputs(before, BLOCK_SIZE))
    return executor, build_model_inputs(output, BLOCK_SIZE)


def changed(array_: np.ndarray, index: tuple[int, ...], value: int) -> np.ndarray:
    array_ = array_.copy()
    array_[index] = value
    return array_


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("input_ids", (0,), VOCAB_SIZE, "input_ids has values outside 0..49"),
        ("input_ids", (0,), -1, "input_ids has values outside"),
        ("position_ids", (2,), 9, "position_ids is not"),
        ("context_lens", (0,), 7, "position_ids is not"),
        ("block_tables", (1, 0), 16, "block_tables has values outside 0..15"),
        ("block_tables", (1, 0), 15, "should hold position 0 of row 1, it holds position -1"),
        ("block_tables", (0, 1), 15, "slot_mapping is not"),
        ("slot_mapping", (0,), 63, "slot_mapping is not"),
        ("slot_mapping", (0,), -1, "should hold position 5 of row 0"),
        ("cu_seqlens", (1,), 0, "a sequence has no new token"),
        ("cu_seqlens", (3,), 5, "cu_seqlens is not 0..T"),
        ("logits_indices", (2,), 6, "logits_indices has values outside 0..5"),
    ],
)
def test_fake_executor_refuses_contradictions(
    name: str, index: tuple[int, ...], value: int, message: str
) -> None:
    executor, inputs = prefilled()
    with pytest.raises(ValueError, match=message):
        executor.execute(replace(inputs, **{name: changed(getattr(inputs, name), index, value)}))


def test_fake_executor_refuses_tables_that_are_too_short() -> None:
    executor, inputs = prefilled()
    with pytest.raises(ValueError, match="2 blocks a table do not hold context_lens"):
        executor.execute(replace(inputs, block_tables=inputs.block_tables[:, :2].copy()))


def test_fake_executor_refuses_a_slot_written_twice() -> None:
    executor, inputs = prefilled()
    same = inputs.block_tables.copy()
    same[2] = same[1]
    both_end_at_12 = replace(
        inputs,
        block_tables=same,
        position_ids=np.array([5, 9, 10, 11, 10, 11], dtype=np.int32),
        context_lens=np.array([6, 12, 12], dtype=np.int32),
    )
    slots = same[[0, 1, 1, 1, 2, 2], both_end_at_12.position_ids // BLOCK_SIZE] * BLOCK_SIZE
    with pytest.raises(ValueError, match="a slot is written twice"):
        executor.execute(
            replace(both_end_at_12, slot_mapping=slots + both_end_at_12.position_ids % BLOCK_SIZE)
        )


def test_fake_executor_reads_the_history_through_the_block_tables() -> None:
    executor, inputs = prefilled()
    expected = executor.execute(inputs).logits
    # Same positions, other tokens: a block of another sequence, and a stale token.
    foreign = changed(inputs.block_tables, (0, 0), inputs.block_tables[1, 0])
    other = executor.execute(replace(inputs, block_tables=foreign)).logits
    assert (other[0] != expected[0]).any()
    assert np.array_equal(other[1:], expected[1:])
    stale = changed(inputs.input_ids, (1,), (inputs.input_ids[1] + 1) % VOCAB_SIZE)
    other = executor.execute(replace(inputs, input_ids=stale)).logits
    assert (other != expected).any(axis=1).tolist() == [False, True, False]


def test_fake_executor_gives_the_same_logits_however_the_prompt_is_cut() -> None:
    tokens = tuple(range(20, 33))
    rows = []
    for chunks in ([13], [1] * 13, [4, 4, 5], [7, 6]):
        sequence = Sequence.from_request(EngineRequest("a", tokens, SamplingParams()), (), 1000)
        sequence.block_table = array("i", [3, 0, 5, 1])
        executor = FakeExecutor(VOCAB_SIZE, num_blocks=6, block_size=BLOCK_SIZE)
        start = 0
        for num_tokens in chunks:
            inputs = build_model_inputs(SchedulerOutput([sequence], [start], [num_tokens]), BLOCK_SIZE)
            row = executor.execute(inputs).logits[0]
            start += num_tokens
        rows.append(row)
    assert all(np.array_equal(row, rows[0]) for row in rows)

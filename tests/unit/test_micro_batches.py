"""A step in parts computes what the whole step computes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.checking.packing import PackedSequences
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.parallel.micro_batches import split_step

BLOCK_SIZE, NUM_BLOCKS, VOCAB_SIZE = 4, 64, 50


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=8),
    max_parts=st.integers(1, 4),
    min_tokens=st.integers(1, 12),
    data=st.data(),
)
def test_parts_compute_what_the_whole_computes(
    lengths: list[tuple[int, int]], max_parts: int, min_tokens: int, data: st.DataObject
) -> None:
    """Whatever is cached before, and whichever rows of logits are wanted, in any order, some even twice."""
    num_tokens = sum(new for _, new in lengths)
    wanted = data.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=10))
    executors = [FakeExecutor(VOCAB_SIZE, NUM_BLOCKS, BLOCK_SIZE) for _ in range(2)]
    sequences = PackedSequences(BLOCK_SIZE, range(NUM_BLOCKS))
    before = {str(row): [row] * past for row, (past, _) in enumerate(lengths) if past}
    if before:
        inputs = sequences.step(before)
        for executor in executors:
            executor.execute(inputs)
    inputs = sequences.step({str(row): [*range(new)] for row, (_, new) in enumerate(lengths)}, wanted)

    parts = split_step(inputs, max_parts, min_tokens)
    assert 1 <= len(parts) <= max_parts
    assert len(parts) == 1 or num_tokens / len(parts) >= min_tokens
    logits = np.full((len(wanted), VOCAB_SIZE), np.nan, np.float32)
    for part in parts:
        outputs = executors[0].execute(part.inputs)
        if part.num_wanted:
            logits[part.is_wanted] = outputs.logits
    np.testing.assert_array_equal(logits, executors[1].execute(inputs).logits)


def test_parts_have_about_as_many_tokens() -> None:
    sequences = PackedSequences(BLOCK_SIZE, range(NUM_BLOCKS))
    inputs = sequences.step({str(row): [1] * size for row, size in enumerate([30, 10, 10, 10, 25, 5])})
    parts = split_step(inputs, 3, 1)
    assert [len(part.inputs.input_ids) for part in parts] == [30, 30, 30]

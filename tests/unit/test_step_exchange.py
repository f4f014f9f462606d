"""A step and its logits, there and back: in memory that ranks share, and in messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.manifest import LayerCache, Manifest, Rank
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.parallel.group_memory import GroupMemory
from trtforge.runtime.parallel.step_exchange import (
    MemoryReceiver,
    MemorySender,
    MessageReceiver,
    MessageSender,
    StepReceiver,
    StepSender,
)

COLUMNS = ((0, 0), (0, 70), (70, 128))  # the first rank is of a stage that computes no logits
CACHE = (LayerCache(num_kv_heads=1, head_dim=16),)

Exchange = tuple[StepSender, list[StepReceiver]]


@pytest.fixture(scope="module", params=["memory", "messages"])
def exchange(request: pytest.FixtureRequest, make_manifest: Callable[..., Manifest]) -> Exchange:
    ranks = tuple(
        Rank(onnx=f"rank{rank}/model.onnx", kv_layers=CACHE, logits_columns=columns)
        for rank, columns in enumerate(COLUMNS)
    )
    manifest = make_manifest(CACHE, vocab_size=128).model_copy(update={"ranks": ranks, "pp_size": 3})
    if request.param == "messages":
        return MessageSender(manifest), [MessageReceiver(columns) for columns in COLUMNS]
    memory, fd = GroupMemory.create(manifest)
    os.close(fd)
    return MemorySender(memory.steps), [MemoryReceiver(memory.steps, columns) for columns in COLUMNS]


def make_inputs(num_tokens: int, num_seqs: int, max_blocks: int, num_rows: int) -> ModelInputs:
    numbers = np.random.default_rng(num_tokens)

    def draw(*shape: int) -> np.ndarray:
        return numbers.integers(-(2**31), 2**31, shape, np.int32)

    return ModelInputs(
        input_ids=draw(num_tokens),
        position_ids=draw(num_tokens),
        block_tables=draw(num_seqs, max_blocks),
        cu_seqlens=draw(num_seqs + 1),
        context_lens=draw(num_seqs),
        slot_mapping=draw(num_tokens),
        logits_indices=draw(num_rows),
    )


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 512),
    num_seqs=st.integers(1, 8),
    max_blocks=st.integers(1, 16),
    num_rows=st.integers(1, 20),
)
def test_all_ranks_read_what_was_written_and_logits_come_back_in_their_columns(
    exchange: Exchange, num_tokens: int, num_seqs: int, max_blocks: int, num_rows: int
) -> None:
    sender, receivers = exchange
    inputs = make_inputs(num_tokens, num_seqs, max_blocks, num_rows)
    step = sender.write(inputs)
    expected = np.random.default_rng(1).standard_normal((num_rows, 128), np.float32)
    answers = []
    for receiver, (start, stop) in zip(receivers, COLUMNS, strict=True):
        read = receiver.read(step)
        for field in fields(ModelInputs):
            array = getattr(read, field.name)
            np.testing.assert_array_equal(array, getattr(inputs, field.name))
            assert array.flags.writeable
            assert array.flags.c_contiguous
        logits = receiver.logits(num_rows)
        logits[:] = expected[:, start:stop]
        answers.append(receiver.answer(logits))
    np.testing.assert_array_equal(sender.logits(step, answers), expected)


def test_a_step_above_the_limits_is_refused(exchange: Exchange) -> None:
    with pytest.raises(ValueError, match="larger than the model's limits allow"):
        exchange[0].write(make_inputs(513, 1, 1, 1))

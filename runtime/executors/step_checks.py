"""Refuses a step that would read or write what does not belong to it."""

from __future__ import annotations

import numpy as np

from trtforge.runtime.executor import Int32Array, KVCacheSpec, ModelInputs


def check_step(inputs: ModelInputs, spec: KVCacheSpec, vocab_size: int) -> None:
    """Raise ValueError for inputs that contradict each other or point outside the cache or the vocabulary.

    Slots are those that the block tables name, or negative: not stored.
    """
    num_tokens, num_new = len(inputs.input_ids), np.diff(inputs.cu_seqlens)
    tables, block_size = inputs.block_tables, spec.block_size
    past_lens = inputs.context_lens - num_new
    num_blocks_used = -(-inputs.context_lens // block_size)
    require(int(inputs.cu_seqlens[-1]) == num_tokens, "cu_seqlens does not end with the number of tokens")
    require(bool((num_new > 0).all()), "a sequence has no new token")
    require(bool((past_lens >= 0).all()), "context_lens do not include the new tokens")
    require(int(num_blocks_used.max()) <= tables.shape[1], "block_tables are shorter than context_lens")
    _require_range("input_ids", inputs.input_ids, vocab_size)
    _require_range("block_tables", tables, spec.num_blocks)
    _require_range("logits_indices", inputs.logits_indices, num_tokens)

    rows = np.repeat(np.arange(len(num_new)), num_new)  # [T]: whose token it is
    positions = np.arange(num_tokens) + (past_lens - inputs.cu_seqlens[:-1])[rows]
    require(np.array_equal(inputs.position_ids, positions), "position_ids differ from context_lens")
    slots = tables[rows, positions // block_size] * block_size + positions % block_size
    require(
        bool(((inputs.slot_mapping == slots) | (inputs.slot_mapping < 0)).all()),
        "slot_mapping differs from the block tables",
    )


def require(condition: bool, problem: str) -> None:
    """Raise ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(problem)


def _require_range(name: str, array: Int32Array, end: int) -> None:
    require(int(array.min()) >= 0 and int(array.max()) < end, f"{name} has values outside 0..{end - 1}")

"""The one place where scheduled sequences become flat arrays."""

from __future__ import annotations

import numpy as np

from trtforge.runtime.executor import Int32Array, ModelInputs
from trtforge.runtime.scheduler import SchedulerOutput
from trtforge.runtime.sequence import Sequence


def build_model_inputs(output: SchedulerOutput, block_size: int) -> ModelInputs:
    """Pack a step of at least one sequence; logits are asked for the last new token of each.

    Reads the sequences as they are before the step: their block tables have the new tokens' slots,
    `num_computed_tokens` does not count them yet.
    """
    sequences = output.sequences
    num_new = np.array(output.num_scheduled_tokens, dtype=np.int32)  # [B]
    num_computed = np.array([sequence.num_computed_tokens for sequence in sequences], dtype=np.int32)  # [B]
    cu_seqlens = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(num_new, out=cu_seqlens[1:])

    # Joined as bytes: a bytearray keeps the array over it writable, and nothing is converted twice.
    input_ids = bytearray().join(
        [
            sequence.token_ids[sequence.num_computed_tokens : sequence.num_computed_tokens + num_tokens]
            for sequence, num_tokens in zip(sequences, output.num_scheduled_tokens, strict=True)
        ]
    )
    num_tokens = int(cu_seqlens[-1])
    position_ids = np.arange(num_tokens, dtype=np.int32)
    position_ids += np.repeat(num_computed - cu_seqlens[:-1], num_new)
    block_tables = _pad_block_tables(sequences)
    rows = np.repeat(np.arange(len(sequences)), num_new)  # [T]: whose token it is
    slot_mapping = block_tables[rows, position_ids // block_size] * np.int32(block_size)
    slot_mapping += position_ids % block_size
    return ModelInputs(
        input_ids=np.frombuffer(input_ids, dtype=np.int32),
        position_ids=position_ids,
        block_tables=block_tables,
        cu_seqlens=cu_seqlens,
        context_lens=num_computed + num_new,
        slot_mapping=slot_mapping,
        logits_indices=cu_seqlens[1:] - 1,
    )


def _pad_block_tables(sequences: list[Sequence]) -> Int32Array:
    """[B, length of the longest table], padded with 0."""
    tables = [sequence.block_table.tobytes() for sequence in sequences]
    row_bytes = max(map(len, tables))
    padded = bytearray().join([table.ljust(row_bytes, b"\0") for table in tables])
    return np.frombuffer(padded, dtype=np.int32).reshape(len(tables), -1)

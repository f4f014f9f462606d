"""The one place where scheduled sequences become flat arrays."""

from __future__ import annotations

import numpy as np

from trtforge.runtime.executor import Int32Array, ModelInputs
from trtforge.runtime.scheduling.schedule import SchedulerOutput
from trtforge.runtime.scheduling.sequence import Sequence


def build_model_inputs(output: SchedulerOutput, block_size: int) -> ModelInputs:
    """Pack a step of at least one sequence.

    Logits are asked for the last new token of each sequence, for its drafts and the token before them, and
    for all new prompt tokens of those that want logprobs of them; see `num_logits`.
    """
    sequences = output.sequences
    num_new = np.array(output.num_scheduled_tokens, dtype=np.int32)  # [B]
    num_computed = np.array(output.starts, dtype=np.int32)  # [B]
    cu_seqlens = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(num_new, out=cu_seqlens[1:])

    # Joined as bytes: a bytearray keeps the array over it writable, and nothing is converted twice.
    input_ids = bytearray().join(
        [
            sequence.token_ids[start : start + num_tokens]
            for sequence, start, num_tokens in zip(
                sequences, output.starts, output.num_scheduled_tokens, strict=True
            )
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
        logits_indices=_logits_indices(output, cu_seqlens),
    )


def num_logits(sequence: Sequence, num_tokens: int) -> int:
    """How many of its `num_tokens` new tokens, the last ones, a sequence wants logits of."""
    return num_tokens if sequence.wants_prompt_logprobs else 1 + sequence.num_draft_tokens


def _logits_indices(output: SchedulerOutput, cu_seqlens: Int32Array) -> Int32Array:
    ends: Int32Array = cu_seqlens[1:]
    if output.is_plain:
        lasts: Int32Array = np.subtract(ends, 1, dtype=np.int32)
        return lasts
    counts = np.array(
        [num_logits(s, n) for s, n in zip(output.sequences, output.num_scheduled_tokens, strict=True)],
        dtype=np.int32,
    )
    num_rows = int(counts.sum())
    # Row r of a sequence's count c at its end e is token e - c + r.
    firsts = np.repeat(ends - np.cumsum(counts, dtype=np.int32), counts)
    rows: Int32Array = np.add(firsts, np.arange(num_rows), dtype=np.int32, casting="same_kind")
    return rows


def _pad_block_tables(sequences: list[Sequence]) -> Int32Array:
    """[B, length of the longest table], padded with 0."""
    tables = [sequence.block_table.tobytes() for sequence in sequences]
    row_bytes = max(map(len, tables))
    padded = bytearray().join([table.ljust(row_bytes, b"\0") for table in tables])
    return np.frombuffer(padded, dtype=np.int32).reshape(len(tables), -1)

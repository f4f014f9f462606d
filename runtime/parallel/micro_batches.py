"""Cuts a step into parts, which pipeline stages compute at the same time, each stage another part."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import ModelInputs

# A stage reads all of its weights for each part: with fewer tokens than this that takes longer than what is
# computed with them, and nothing is won.
MIN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some of a step's sequences."""

    inputs: ModelInputs
    # [R of the step]: which of its rows of logits these are; those of `inputs` are in the same order. Without
    # any, `inputs` asks for one that nobody wants.
    is_wanted: npt.NDArray[np.bool_]

    @property
    def num_wanted(self) -> int:
        """Rows of logits that somebody wants."""
        return int(self.is_wanted.sum())


def split_step(inputs: ModelInputs, max_parts: int, min_tokens: int = MIN_TOKENS) -> list[MicroBatch]:
    """At most `max_parts` parts of about as many tokens each, and not fewer than `min_tokens` on average.

    A sequence is not divided: attention of its later tokens needs what the earlier ones store.
    """
    num_tokens, num_seqs = len(inputs.input_ids), len(inputs.context_lens)
    num_parts = max(1, min(max_parts, num_seqs, num_tokens // min_tokens))
    aims = np.arange(1, num_parts) * num_tokens / num_parts
    cuts = np.unique([0, *np.searchsorted(inputs.cu_seqlens, aims), num_seqs])
    return [_part(inputs, int(begin), int(end)) for begin, end in itertools.pairwise(cuts)]


def _part(inputs: ModelInputs, begin: int, end: int) -> MicroBatch:
    """Sequences `begin` to `end`."""
    seqs, tokens = slice(begin, end), slice(int(inputs.cu_seqlens[begin]), int(inputs.cu_seqlens[end]))
    wanted = inputs.logits_indices
    is_wanted = (wanted >= tokens.start) & (wanted < tokens.stop)
    rows = wanted[is_wanted] - np.int32(tokens.start)
    part = ModelInputs(
        input_ids=inputs.input_ids[tokens],
        position_ids=inputs.position_ids[tokens],
        block_tables=inputs.block_tables[seqs],
        cu_seqlens=inputs.cu_seqlens[begin : end + 1] - inputs.cu_seqlens[begin],
        context_lens=inputs.context_lens[seqs],
        slot_mapping=inputs.slot_mapping[tokens],
        logits_indices=rows if len(rows) else np.zeros(1, np.int32),
    )
    return MicroBatch(part, is_wanted)

"""Decode steps padded to one of a few numbers of sequences, for each of which there can be a CUDA graph.

A padding row is a sequence of one token that sees itself alone, at slot 0 of block 0, whatever that holds.
It is not stored (its slot is -1), and its logits are not looked at. So nothing outside the cache is read,
and nothing that belongs to a sequence is written.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, fields

import numpy as np

from trtforge.manifest import Limits
from trtforge.runtime.executor import Int32Array, ModelInputs


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two up to the first that holds `max_num_seqs`, which replaces it."""
    sizes = []
    size = 1
    while size < max_num_seqs:
        sizes.append(size)
        size *= 2
    return [*sizes, max_num_seqs]


def pad_decode(inputs: ModelInputs, num_seqs: int, num_blocks: int) -> ModelInputs:
    """A step of one new token a sequence with `num_seqs` sequences and rows of logits, and `num_blocks`
    blocks a table; blocks beyond that have to be unused. The wanted rows of logits are the first ones."""
    tables = np.zeros((num_seqs, num_blocks), np.int32)
    used = inputs.block_tables[:, :num_blocks]
    tables[: len(used), : used.shape[1]] = used
    return ModelInputs(
        input_ids=_pad(inputs.input_ids, num_seqs, 0),
        position_ids=_pad(inputs.position_ids, num_seqs, 0),
        block_tables=tables,
        cu_seqlens=np.arange(num_seqs + 1, dtype=np.int32),
        context_lens=_pad(inputs.context_lens, num_seqs, 1),
        slot_mapping=_pad(inputs.slot_mapping, num_seqs, -1),
        logits_indices=_pad(inputs.logits_indices, num_seqs, 0),
    )


def _pad(array: Int32Array, size: int, value: int) -> Int32Array:
    padded = np.full(size, value, np.int32)
    padded[: len(array)] = array
    return padded


@dataclass(frozen=True, slots=True)
class DecodeBatches:
    """The numbers of sequences that decode steps are padded to, ascending, and the length of their tables."""

    sizes: tuple[int, ...]
    num_blocks: int  # of the longest sequence
    block_size: int

    @classmethod
    def of(cls, limits: Limits, block_size: int) -> DecodeBatches:
        """Those of a model."""
        num_blocks = -(-limits.max_model_len // block_size)
        return cls(tuple(batch_sizes(limits.max_num_seqs)), num_blocks, block_size)

    def size_for(self, inputs: ModelInputs) -> int | None:
        """The smallest that holds a step; None for a step that none holds, or with more than one new token
        for some sequence."""
        num_seqs = len(inputs.context_lens)
        index = bisect.bisect_left(self.sizes, max(num_seqs, len(inputs.logits_indices)))
        is_short = inputs.context_lens.max() <= self.num_blocks * self.block_size
        if len(inputs.input_ids) != num_seqs or not is_short or index == len(self.sizes):
            return None
        return self.sizes[index]

    def pad(self, inputs: ModelInputs, size: int) -> ModelInputs:
        """`inputs` with `size` sequences."""
        return pad_decode(inputs, size, self.num_blocks)

    def padding(self, size: int) -> ModelInputs:
        """A step of nothing but padding."""
        none = np.empty(0, np.int32)
        return self.pad(ModelInputs(none, none, np.empty((0, 0), np.int32), none, none, none, none), size)


def step_arrays(inputs: ModelInputs) -> dict[str, Int32Array]:
    """The arrays of a step by the names of the graph's inputs."""
    return {field.name: getattr(inputs, field.name) for field in fields(inputs)}

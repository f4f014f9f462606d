"""The executor protocol: arrays in, logits out. An executor knows no requests, phases or features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trtforge.runtime.scheduling.block_moves import BlockMoves

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """The paged cache that an executor has allocated."""

    block_size: int  # tokens a block
    num_blocks: int
    num_host_blocks: int = 0  # room in host memory for swapped blocks


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One step: T new tokens of B sequences, packed on one axis in sequence order.

    Prefill, chunked prefill and decode differ only in how many new tokens a sequence has. See
    `trtforge.wire.GRAPH_INPUTS` for the meaning of each array; all are int32 and C-contiguous.
    """

    input_ids: Int32Array  # [T]
    position_ids: Int32Array  # [T]
    block_tables: Int32Array  # [B, max_blocks], padded with 0
    cu_seqlens: Int32Array  # [B + 1]
    context_lens: Int32Array  # [B], new tokens included
    slot_mapping: Int32Array  # [T]
    logits_indices: Int32Array  # [R], R >= 1


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """The step's result. The arrays are valid until the next `execute` only: executors reuse buffers."""

    logits: Float32Array  # [R, vocab_size]
    # [R], of executors that have it for little more than the logits; -1 for a row with NaN or infinity
    argmax: Int32Array | None = None


class Executor(Protocol):
    """Runs the model on one step's packed inputs. Not thread-safe; one thread owns it.

    Blocks are written in place: what a step stores in the cache the next step sees. After an exception
    from `execute` the contents of the blocks it was to write are undefined, the others are unharmed. After
    a DeviceError the executor is of no use any more.
    """

    def kv_cache_spec(self) -> KVCacheSpec:
        """The cache as allocated; constant over the executor's life."""
        ...

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move the contents of whole blocks, in all layers, before the next step.

        After an exception nothing is known about any block.
        """
        ...

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Append the new tokens to the cache and return the wanted rows of logits."""
        ...

    def close(self) -> None:
        """Release the model and its cache; idempotent."""
        ...

"""A step's inputs and logits in shared memory, at fixed places."""

from __future__ import annotations

import math
from dataclasses import fields

import msgspec
import numpy as np

from trtforge import wire
from trtforge.manifest import Manifest
from trtforge.runtime.executor import Float32Array, Int32Array, ModelInputs
from trtforge.runtime.parallel.shared_memory import SharedMemory, aligned


class StepSizes(msgspec.Struct, frozen=True):
    """The dims of a step's arrays, by the names that `trtforge.wire.GRAPH_INPUTS` has for them."""

    T: int
    B: int
    max_blocks: int
    R: int

    @classmethod
    def largest(cls, manifest: Manifest) -> StepSizes:
        """Of any step that a model takes."""
        limits = manifest.limits
        return cls(
            T=limits.max_num_batched_tokens,
            B=limits.max_num_seqs,
            max_blocks=-(-limits.max_model_len // manifest.kv_cache.block_size),
            R=limits.max_num_batched_tokens,
        )

    @classmethod
    def of(cls, inputs: ModelInputs) -> StepSizes:
        """Of one step."""
        num_seqs, max_blocks = inputs.block_tables.shape
        return cls(len(inputs.input_ids), num_seqs, max_blocks, len(inputs.logits_indices))

    def check(self, largest: StepSizes) -> None:
        """Raises ValueError for a step that is larger than any should be."""
        if any(size > most for size, most in zip(_numbers(self), _numbers(largest), strict=True)):
            raise ValueError(f"the step is larger than the model's limits allow: {self}, not {largest}")

    def shape(self, tensor: wire.GraphTensor) -> tuple[int, ...]:
        """The shape of one of the arrays."""
        sizes = {"T": self.T, "B": self.B, "B_plus_1": self.B + 1, "max_blocks": self.max_blocks, "R": self.R}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.dims)


class StepMemory:
    """Where the driver writes the inputs of a step, all ranks read them, and the last stage's write logits.

    The driver tells the sizes of a step by another way, which is also how ranks learn that it is there.
    """

    def __init__(self, memory: SharedMemory, offset: int, largest: StepSizes, vocab_size: int) -> None:
        """It occupies step_bytes from `offset`."""
        self._memory = memory
        self._largest = largest
        self._offsets: dict[str, int] = {}
        for tensor in wire.GRAPH_INPUTS:
            self._offsets[tensor.name] = offset
            offset += aligned(4 * math.prod(largest.shape(tensor)))
        self._logits = memory.array(offset, (largest.R, vocab_size), np.float32)

    @staticmethod
    def num_bytes(largest: StepSizes, vocab_size: int) -> int:
        """Size for steps up to the largest."""
        inputs = sum(aligned(4 * math.prod(largest.shape(tensor))) for tensor in wire.GRAPH_INPUTS)
        return inputs + aligned(4 * largest.R * vocab_size)

    def write(self, inputs: ModelInputs) -> StepSizes:
        """Put a step there. Raises ValueError, and writes nothing, if it is larger than any should be."""
        sizes = StepSizes.of(inputs)
        sizes.check(self._largest)
        for tensor in wire.GRAPH_INPUTS:
            self._input(tensor, sizes)[...] = getattr(inputs, tensor.name)
        return sizes

    def read(self, sizes: StepSizes) -> ModelInputs:
        """The step that is there, in place."""
        arrays = {tensor.name: self._input(tensor, sizes) for tensor in wire.GRAPH_INPUTS}
        return ModelInputs(**{field.name: arrays[field.name] for field in fields(ModelInputs)})

    def logits(self, num_rows: int) -> Float32Array:
        """[num_rows, vocab_size]"""
        return self._logits[:num_rows]

    def _input(self, tensor: wire.GraphTensor, sizes: StepSizes) -> Int32Array:
        return self._memory.array(self._offsets[tensor.name], sizes.shape(tensor), np.int32)


def _numbers(sizes: StepSizes) -> tuple[int, ...]:
    return msgspec.structs.astuple(sizes)

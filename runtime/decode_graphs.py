"""Decode steps as CUDA graphs: one for each of a few numbers of sequences, to which steps are padded.

A padding row is a sequence of one token that sees itself alone, at slot 0 of block 0, whatever that holds.
It is not stored (its slot is -1), and its logits are not looked at. So nothing outside the cache is read,
and nothing that belongs to a sequence is written.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from trtforge.manifest import Limits
from trtforge.runtime.executor import Int32Array, ModelInputs

logger = logging.getLogger(__name__)

# One step: the graph's inputs -> logits [R, vocab_size] and their argmax [R].
RunStep = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]


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
class _CapturedStep:
    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]  # where the graph reads
    outputs: tuple[Tensor, Tensor]  # where it writes


class DecodeGraphs:
    """Captures the steps when it is made, so that no request waits for it."""

    def __init__(self, run_step: RunStep, device: torch.device, limits: Limits, block_size: int) -> None:
        """`run_step` must not wait for the device."""
        self._sizes = batch_sizes(limits.max_num_seqs)
        self._num_blocks = -(-limits.max_model_len // block_size)
        self._max_context_len = self._num_blocks * block_size
        self._pool = torch.cuda.graph_pool_handle()
        # The largest one first: the others fit into its memory.
        self._steps = {size: self._capture(run_step, device, size) for size in reversed(self._sizes)}
        logger.info("captured decode steps of %s sequences", self._sizes)

    def run(self, inputs: ModelInputs) -> tuple[Tensor, Tensor] | None:
        """Logits and argmax of a step, valid until the next one; None if no graph is made for it."""
        num_seqs, num_rows = len(inputs.context_lens), len(inputs.logits_indices)
        index = bisect.bisect_left(self._sizes, max(num_seqs, num_rows))
        is_decode = len(inputs.input_ids) == num_seqs and inputs.context_lens.max() <= self._max_context_len
        if not is_decode or index == len(self._sizes):
            return None
        size = self._sizes[index]
        step = self._steps[size]
        for name, array in step_arrays(pad_decode(inputs, size, self._num_blocks)).items():
            step.inputs[name].copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)
        step.graph.replay()
        logits, argmax = step.outputs
        return logits[:num_rows], argmax[:num_rows]

    def _capture(self, run_step: RunStep, device: torch.device, size: int) -> _CapturedStep:
        none = np.empty(0, np.int32)
        nobody = ModelInputs(none, none, np.empty((0, 0), np.int32), none, none, none, none)
        padding = step_arrays(pad_decode(nobody, size, self._num_blocks))
        inputs = {name: torch.from_numpy(array).to(device) for name, array in padding.items()}
        run_step(inputs)  # libraries and kernels are loaded by their first use
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run_step(inputs)
        return _CapturedStep(graph, inputs, outputs)


def step_arrays(inputs: ModelInputs) -> dict[str, Int32Array]:
    """The arrays of a step by the names of the graph's inputs."""
    return {field.name: getattr(inputs, field.name) for field in fields(inputs)}

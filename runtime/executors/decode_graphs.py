"""Decode steps as CUDA graphs of torch: one for each number of sequences that steps are padded to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trtforge.manifest import Limits
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.decode_batches import DecodeBatches, step_arrays

logger = logging.getLogger(__name__)

# One step: the graph's inputs -> logits [R, vocab_size] and their argmax [R].
RunStep = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]  # where the graph reads
    outputs: tuple[Tensor, Tensor]  # where it writes


class DecodeGraphs:
    """Captures the steps when it is made, so that no request waits for it."""

    def __init__(self, run_step: RunStep, device: torch.device, limits: Limits, block_size: int) -> None:
        """`run_step` must not wait for the device."""
        self._batches = DecodeBatches.of(limits, block_size)
        self._pool = torch.cuda.graph_pool_handle()
        # The largest one first: the others fit into its memory.
        self._steps = {size: self._capture(run_step, device, size) for size in reversed(self._batches.sizes)}
        logger.info("captured decode steps of %s sequences", list(self._batches.sizes))

    def run(self, inputs: ModelInputs) -> tuple[Tensor, Tensor] | None:
        """Logits and argmax of a step, valid until the next one; None if no graph is made for it."""
        size = self._batches.size_for(inputs)
        if size is None:
            return None
        step = self._steps[size]
        for name, array in step_arrays(self._batches.pad(inputs, size)).items():
            step.inputs[name].copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)
        step.graph.replay()
        logits, argmax = step.outputs
        num_rows = len(inputs.logits_indices)
        return logits[:num_rows], argmax[:num_rows]

    def _capture(self, run_step: RunStep, device: torch.device, size: int) -> _CapturedStep:
        padding = step_arrays(self._batches.padding(size))
        inputs = {name: torch.from_numpy(array).to(device) for name, array in padding.items()}
        run_step(inputs)  # libraries and kernels are loaded by their first use
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run_step(inputs)
        return _CapturedStep(graph, inputs, outputs)

"""All ranks of a model in one process: a thread each, which meet where they add up what they have."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from trtforge import wire
from trtforge.builder.export import ExportedModel, write_graph
from trtforge.runtime.executor import KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.torch_graph import Node, Program, compile_graph
from trtforge.runtime.executors.torch_operation import Operation
from trtforge.runtime.executors.torch_operators import Operators

_TIMEOUT_SECONDS = 60
_UNWRITTEN = 7.0  # what the cache holds before anything is stored


class Meeting:
    """Where the ranks of a stage add up."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self._parts: list[Any] = [None] * size

    def all_reduce(self, rank: int, x: Tensor) -> Tensor:
        """The same sum for all, in the same order."""
        self._parts[rank] = x
        self.barrier.wait(_TIMEOUT_SECONDS)
        total = sum(self._parts[1:], self._parts[0])
        self.barrier.wait(_TIMEOUT_SECONDS)
        return total


@dataclass(frozen=True)
class Rank:
    """One rank's program, with the names of its inputs and its caches."""

    program: Program
    inputs: tuple[str, ...]
    caches: dict[str, Tensor]


class ThreadedRanks:
    """Executes steps as an executor does."""

    def __init__(
        self, exported: Sequence[ExportedModel], tp: int, folder: Path, block_size: int, num_blocks: int
    ) -> None:
        """Write the graphs of `exported`, by stage, into `folder`, and read them again."""
        self._spec = KVCacheSpec(block_size, num_blocks)
        self._tp = tp
        self._stages = []
        for start in range(0, len(exported), tp):
            meeting = Meeting(tp)
            ranks = [
                self._load(rank, folder / f"rank{start + index}", meeting, index)
                for index, rank in enumerate(exported[start : start + tp])
            ]
            self._stages.append((meeting, ranks))

    def _load(self, exported: ExportedModel, folder: Path, meeting: Meeting, index: int) -> Rank:
        write_graph(exported, folder)
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        _name_result(graph)
        operators = Operators(None)

        def make_operation(node: Node) -> Operation:
            if node.op_type == "AllReduce":
                return lambda x: meeting.all_reduce(index, x)
            return operators.make(node)

        spec = self._spec
        caches = {
            wire.kv_cache_input(number): torch.full(
                (spec.num_blocks, 2, spec.block_size, layer.num_kv_heads, layer.head_dim), _UNWRITTEN
            )
            for number, layer in enumerate(exported.layers)
        }
        program = compile_graph(graph, folder, torch.device("cpu"), make_operation)
        return Rank(program, tuple(value.name for value in graph.input), caches)

    def kv_cache_spec(self) -> KVCacheSpec:
        """The caches of all ranks."""
        return self._spec

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Run one step."""
        values = {tensor.name: torch.from_numpy(getattr(inputs, tensor.name)) for tensor in wire.GRAPH_INPUTS}
        for meeting, ranks in self._stages:
            results = _run(meeting, ranks, values)
            values[wire.HIDDEN_STATES] = results[0]
        return ModelOutputs(logits=torch.cat(results, dim=1).numpy())


def _run(meeting: Meeting, ranks: Sequence[Rank], values: dict[str, Tensor]) -> list[Tensor]:
    results: list[Any] = [None] * len(ranks)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        rank = ranks[index]
        try:
            given = values | rank.caches
            results[index] = rank.program.run({name: given[name] for name in rank.inputs})
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


def _name_result(graph: onnx.GraphProto) -> None:
    """Programs give the logits: let what a stage hands on be called so."""
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == wire.HIDDEN_STATES_OUT:
                node.output[index] = wire.LOGITS

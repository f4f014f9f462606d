"""Runs the packed graph with torch, on a CPU or an NVIDIA GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from trtforge import wire
from trtforge.errors import CapacityError, ConfigError, ServerError
from trtforge.host_memory import available_memory_bytes
from trtforge.manifest import KVCacheLayout, Manifest
from trtforge.runtime.executor import KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.decode_batches import step_arrays
from trtforge.runtime.executors.decode_graphs import DecodeGraphs
from trtforge.runtime.executors.graph_file import read_graph_file
from trtforge.runtime.executors.kernel_calls import Launcher
from trtforge.runtime.executors.step_checks import check_step
from trtforge.runtime.executors.torch_graph import Program, compile_graph
from trtforge.runtime.executors.torch_links import DeviceLinks, HostLinks, Links
from trtforge.runtime.executors.torch_operation import torch_dtype
from trtforge.runtime.executors.torch_operators import Operators
from trtforge.runtime.parallel.communicator import Communicator
from trtforge.runtime.scheduling.block_moves import BlockMoves, Move

logger = logging.getLogger(__name__)


def default_device(index: int = 0) -> torch.device:
    """The GPU with that number, if there are GPUs; it is the current one then.

    Raises ConfigError if there are not as many.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if num_devices <= index:
        raise ConfigError(
            f"the model's ranks need GPU {index}, counted from 0, and this machine has {num_devices}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def available_device_bytes(device: torch.device) -> int:
    """Memory of `device` that is free."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes
    return available_memory_bytes()


@dataclass(frozen=True, slots=True)
class RankLinks:
    """A rank's place in the pipeline, and the way to the others."""

    links: Links
    is_first: bool
    is_last: bool

    @classmethod
    def of(cls, communicator: Communicator, device: torch.device, timeout_s: float) -> RankLinks:
        """For the executor's device; on a GPU, waits for the other ranks."""
        links: Links = HostLinks(communicator)
        if device.type == "cuda":
            links = DeviceLinks(communicator, device, timeout_s=timeout_s)
        return cls(links, communicator.is_first, communicator.is_last)


class ReferenceExecutor:
    """Executes a built model with torch, node by node; custom operators by their kernels, if it can launch
    them. On a GPU, decode steps are CUDA graphs as long as no operation waits for the device.
    """

    def __init__(
        self,
        model_dir: Path,
        manifest: Manifest,
        *,
        device: torch.device | None = None,
        launcher: Launcher | None = None,
        threads: int = 0,
        num_host_blocks: int = 0,
        rank_links: RankLinks | None = None,
    ) -> None:
        """Load the graph in `model_dir` and allocate its cache. `launcher` is one of `device`; `threads` are
        those of a CPU, for the whole process: 0 leaves them as they are. Of a model on several ranks,
        `manifest` is this one's alone and `rank_links` lead to the others.

        Raises ConfigError for a graph that cannot be executed, and CapacityError if there is no memory for
        the cache.
        """
        if threads:
            torch.set_num_threads(threads)
        layout = manifest.kv_cache
        if layout.dtype == "int8":
            raise ConfigError(f"{model_dir} has a KV cache of int8, which only OpenVINO has scales for")
        path = model_dir / manifest.ranks[0].onnx
        self._device = device or default_device()
        self._vocab_size = manifest.model.vocab_size
        self._spec = KVCacheSpec(layout.block_size, layout.num_blocks, num_host_blocks)
        self._rank = rank_links
        operators = Operators(launcher, None if rank_links is None else rank_links.links)
        graph = read_graph_file(path, len(layout.layers))
        output = wire.stage_output(is_last=rank_links is None or rank_links.is_last)
        self._program: Program | None = compile_graph(
            graph, path.parent, self._device, operators.make, output
        )
        self._hidden_states = _hidden_states(graph)
        self._caches = _allocate_caches(layout, layout.num_blocks, self._device)
        self._host_caches = _allocate_caches(layout, num_host_blocks, torch.device("cpu"))
        self._graphs: DecodeGraphs | None = None
        if self._device.type == "cuda" and rank_links is not None:
            logger.warning("decode steps are no CUDA graphs: the ranks of a model meet within them")
        elif self._device.type == "cuda" and operators.waiting:
            names = ", ".join(sorted(operators.waiting))
            logger.warning("decode steps are no CUDA graphs: without kernels, %s waits for the device", names)
        elif self._device.type == "cuda":
            with torch.inference_mode():
                self._graphs = DecodeGraphs(self._run, self._device, manifest.limits, layout.block_size)
        logger.info("%s: %s on %s, %s", path, manifest.dtype, self._device, self._spec)

    def kv_cache_spec(self) -> KVCacheSpec:
        """The cache as the manifest has it."""
        return self._spec

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move keys and values of all layers."""
        for name, cache in self._caches.items():
            _copy_blocks(moves.swap_out, cache, self._host_caches[name])
            _copy_blocks(moves.swap_in, self._host_caches[name], cache)
            _copy_blocks(moves.copies, cache, cache)

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Run one step.

        Raises ValueError, before anything is stored, for inputs that contradict each other or point outside
        the cache or the vocabulary. A rank's logits are those of its columns; of a stage that is not the last
        there are none.
        """
        if self._program is None:
            raise ServerError("the executor is closed")
        check_step(inputs, self._spec, self._vocab_size)
        if self._rank is not None:
            return self._execute_rank(inputs, self._rank)
        with torch.inference_mode():
            outputs = None if self._graphs is None else self._graphs.run(inputs)
            if outputs is None:
                outputs = self._run(self._to_device(inputs))
            logits, argmax = _to_host(outputs)
        return ModelOutputs(logits=logits.numpy(), argmax=argmax.numpy())

    def close(self) -> None:
        """Release the model and its cache."""
        self._program = self._graphs = None
        self._caches, self._host_caches = {}, {}

    def _execute_rank(self, inputs: ModelInputs, rank: RankLinks) -> ModelOutputs:
        step = self._to_device(inputs)
        with torch.inference_mode():
            if not rank.is_first:
                hidden_size, dtype = self._hidden_states
                step[wire.HIDDEN_STATES] = rank.links.receive((len(inputs.input_ids), hidden_size), dtype)
            output = self._compute(step)
            if rank.is_last:
                return ModelOutputs(logits=output.cpu().numpy())
            rank.links.send(output)
        return ModelOutputs(logits=np.empty((len(inputs.logits_indices), 0), np.float32))

    def _to_device(self, inputs: ModelInputs) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array).to(self._device) for name, array in step_arrays(inputs).items()}

    def _compute(self, step: Mapping[str, Tensor]) -> Tensor:
        if self._program is None:
            raise ServerError("the executor is closed")
        return self._program.run({**step, **self._caches})

    def _run(self, step: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, and the likeliest token of each row, -1 where not all are finite."""
        logits = self._compute(step)
        lowest, highest = torch.aminmax(logits, dim=-1)
        finite = lowest.isfinite() & highest.isfinite()
        return logits, torch.where(finite, logits.argmax(dim=-1), -1).to(torch.int32)


def _hidden_states(graph: onnx.GraphProto) -> tuple[int, torch.dtype]:
    """Size and type of what comes from the stage before this one; no size if this is the first."""
    for value in graph.input:
        if value.name == wire.HIDDEN_STATES:
            tensor = value.type.tensor_type
            return tensor.shape.dim[1].dim_value, torch_dtype(tensor.elem_type)
    return 0, torch.float32


def _allocate_caches(layout: KVCacheLayout, num_blocks: int, device: torch.device) -> dict[str, Tensor]:
    """A zeroed cache for each layer, by the name of the graph's input. Raises CapacityError."""
    caches = {}
    dtype = getattr(torch, layout.dtype)
    for index, layer in enumerate(layout.layers):
        shape = (num_blocks, 2, layout.block_size, layer.num_kv_heads, layer.head_dim)
        try:
            # Written to now, so that a lack of memory shows now.
            caches[wire.kv_cache_input(index)] = torch.empty(shape, dtype=dtype, device=device).zero_()
        except RuntimeError as error:
            cache_bytes = num_blocks * layout.block_size * layout.bytes_per_token
            raise CapacityError(
                f"the KV cache of {cache_bytes:,} bytes does not fit into the memory of {device}: free some, "
                "or build with a lower --kv-cache-bytes"
            ) from error
    return caches


def _copy_blocks(moves: list[Move], source: Tensor, target: Tensor) -> None:
    if moves:
        # As bytes: torch indexes no 8-bit floats.
        source, target = source.view(torch.uint8), target.view(torch.uint8)
        sources, targets = torch.tensor(moves).T
        target[targets.to(target.device)] = source[sources.to(source.device)].to(target.device)


def _to_host(tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same in host memory; from a GPU they come in memory that it writes to directly."""
    logits, argmax = tensors
    if logits.device.type != "cuda":
        return logits.contiguous(), argmax
    on_host = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
    for host, tensor in zip(on_host, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(logits.device).synchronize()
    return on_host[0], on_host[1]

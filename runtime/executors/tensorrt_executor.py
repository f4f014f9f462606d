"""Runs engines of TensorRT and TensorRT-RTX on an NVIDIA GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trtforge import wire
from trtforge.engine_file import EngineHost, check_engine, engine_of
from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError, PluginError, ServerError
from trtforge.manifest import KVCacheLayout, Manifest, element_bytes
from trtforge.plugins.cuda_driver import Device
from trtforge.runtime.executor import Float32Array, Int32Array, KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.decode_batches import DecodeBatches, step_arrays
from trtforge.runtime.executors.device_memory import ByteArray, CapturedWork, DeviceStream
from trtforge.runtime.executors.memory_budget import resize
from trtforge.runtime.executors.step_buffers import (
    LogitsBuffer,
    Shapes,
    StepBuffers,
    profile_for,
    shapes_of,
)
from trtforge.runtime.executors.step_checks import check_step
from trtforge.runtime.executors.tensorrt_engine import Engine, ExecutionContext, register_plugins
from trtforge.runtime.executors.tensorrt_links import StageLinks
from trtforge.runtime.parallel.communicator import Communicator
from trtforge.runtime.parallel.nccl import NcclCommunicator
from trtforge.runtime.parallel.rank_view import RankContext, plan_rank_memory
from trtforge.runtime.scheduling.block_moves import BlockMoves
from trtforge.tensorrt_package import PACKAGES, load_package

RANK = 0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _LayerCache:
    """One layer's keys and values, and its room in pinned host memory."""

    address: int
    block_bytes: int
    host: ByteArray  # [num_host_blocks, block_bytes]


class TensorRTExecutor:
    """Executes a built model's engine.

    Every tensor has one address for good. Decode steps of full TensorRT are CUDA graphs, each captured from a
    context of its own, as TensorRT wants it; in a graph are the copies of inputs and outputs too, not what
    pipeline stages tell each other. Other steps are enqueued in the context of the first profile that has
    room for them.

    With TensorRT-RTX no step is a graph: it executes the operators' bodies, whose shapes follow from the
    values of context_lens. A captured step would keep those of the step that it was captured from.
    """

    def __init__(
        self,
        model_dir: Path,
        manifest: Manifest,
        options: EngineOptions,
        *,
        kernels: Path,
        context: RankContext | None = None,
    ) -> None:
        """Load the engine in `model_dir`, give the cache its memory and capture decode steps. `kernels` is
        the folder with the kernels of TensorRT's plugins. Of a model on several ranks, `manifest` is this
        one's alone, and `context` leads to the others.

        Raises ConfigError if the package, a driver, a GPU that the engine was built for or a fitting file is
        missing, CapacityError if there is no memory, and DeviceError for what TensorRT or the GPU refuse.
        """
        package = PACKAGES[manifest.runtime]
        version = load_package(package).__version__
        try:
            gpu = Device(0 if context is None else context.device)
        except PluginError as error:
            raise ConfigError(f"{model_dir} needs an NVIDIA GPU: {error}") from error
        capability = f"{gpu.compute_capability // 10}.{gpu.compute_capability % 10}"
        path = check_engine(model_dir, manifest, RANK, EngineHost(package, version, capability))
        if package == "tensorrt":
            register_plugins(package, kernels)
        self._profiles = engine_of(model_dir, manifest, RANK).profiles
        self._vocab_size = manifest.model.vocab_size
        batches = DecodeBatches.of(manifest.limits, manifest.kv_cache.block_size)
        self._batches = batches if package == "tensorrt" else replace(batches, sizes=())
        self._stream = DeviceStream(gpu)
        communicator = None if context is None else context.communicator
        self._peers: NcclCommunicator | None = None
        if communicator is not None and communicator.shape.tp_size > 1:
            self._peers = NcclCommunicator(communicator)
        capsule = None if self._peers is None else self._peers.capsule
        self._engine: Engine | None = Engine(path, package, self._stream, capsule)
        self._names = _array_names(communicator)
        self._contexts = [self._engine.create_context(index) for index in range(len(self._profiles))]
        self._decode_contexts = {
            size: self._engine.create_context(self._decode_profile(size)) for size in self._batches.sizes
        }
        on_host = self._engine.inputs_on_host(self._names)
        if on_host and self._batches.sizes:
            raise ConfigError(f"{path} reads {on_host} on the host, which decode steps as CUDA graphs cannot")
        self._buffers = StepBuffers(self._names, self._profiles, self._stream, on_host)
        num_tokens, num_rows = (max(profile.dims[dim].max for profile in self._profiles) for dim in "TR")
        self._links = StageLinks(communicator, self._engine, manifest.dtype, num_tokens, self._stream)
        start, stop = manifest.ranks[RANK].logits_columns
        # More rows are wanted only for the log probabilities of prompts.
        num_pinned_rows = manifest.limits.max_num_seqs
        self._logits = LogitsBuffer(stop - start, num_rows, num_pinned_rows, self._stream)
        step_buffers = (self._buffers, self._links, self._logits)
        self._addresses = {name: at for buffer in step_buffers for name, at in buffer.addresses.items()}

        budget = plan_rank_memory(
            manifest,
            options,
            self._stream.free_bytes(),
            context,
            cache_on_host=False,
            step_bytes=self._engine.activation_bytes + sum(buffer.num_bytes for buffer in step_buffers),
        )
        layout = resize(manifest.kv_cache, budget)
        self._spec = KVCacheSpec(layout.block_size, layout.num_blocks, budget.num_host_blocks)
        self._caches = self._allocate_caches(layout)
        for used in (*self._contexts, *self._decode_contexts.values()):
            self._bind(used, layout)
        # The largest one first: what it needs suffices for the others.
        self._graphs = {size: self._capture(size) for size in reversed(self._batches.sizes)}
        logger.info("%s: %s, decode graphs for %s sequences", path, self._spec, self._batches.sizes)

    def kv_cache_spec(self) -> KVCacheSpec:
        """The cache as it was allocated when the engine was loaded."""
        return self._spec

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move keys and values of all layers, in front of the next step. Raises DeviceError."""
        self._stream.make_current()
        for cache in self._caches:
            size = cache.block_bytes
            for block, host_block in moves.swap_out:
                self._stream.copy_out(cache.host[host_block], cache.address + block * size)
            for host_block, block in moves.swap_in:
                self._stream.copy_in(cache.address + block * size, cache.host[host_block])
            for source, target in moves.copies:
                self._stream.copy(cache.address + target * size, cache.address + source * size, size)

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Run one step.

        Raises ValueError, before anything is stored, for inputs that contradict each other, point outside
        the cache or the vocabulary, or make a larger step than the engine was built for; DeviceError for
        what TensorRT or the GPU refuse, and ServerError if another rank fails. A rank's logits are those of
        its columns; of a stage that is not the last there are none.
        """
        if self._engine is None:
            raise ServerError("the executor is closed")
        check_step(inputs, self._spec, self._vocab_size)
        self._stream.make_current()
        num_tokens = len(inputs.input_ids)
        size = self._batches.size_for(inputs)
        if size is None:
            logits = self._enqueue(inputs)
        else:
            logits = self._logits.rows(len(inputs.logits_indices))
            self._buffers.stage(self._arrays(self._batches.pad(inputs, size)))
            self._links.receive(num_tokens, size)
            self._stream.launch(self._graphs[size])
        self._stream.synchronize()
        self._links.send(num_tokens)
        return ModelOutputs(logits=logits)

    def close(self) -> None:
        """Release the engine and its memory."""
        if self._engine is None:
            return
        self._stream.make_current()
        self._stream.synchronize()
        self._contexts, self._decode_contexts, self._graphs = [], {}, {}
        self._engine = None
        self._caches = []
        if self._peers is not None:
            self._peers.close()
        self._stream.close()

    def _arrays(self, inputs: ModelInputs) -> dict[str, Int32Array]:
        """Those of a step that the engine reads."""
        return {name: array for name, array in step_arrays(inputs).items() if name in self._names}

    def _shapes(self, arrays: Mapping[str, Int32Array]) -> Shapes:
        """Those of all inputs of a step with these arrays."""
        shapes = shapes_of(arrays)
        return {**shapes, **self._links.input_shapes(*shapes["position_ids"])}

    def _enqueue(self, inputs: ModelInputs) -> Float32Array:
        """Put a step of any kind on the stream; the logits are valid once it is done."""
        arrays = self._arrays(inputs)
        shapes = self._shapes(arrays)
        context = self._contexts[profile_for(self._profiles, shapes)]
        logits = self._logits.rows(len(inputs.logits_indices))
        self._buffers.stage(arrays)
        context.set_shapes(shapes)
        self._links.receive(len(inputs.input_ids), len(inputs.input_ids))
        self._run(context, shapes, logits)
        return logits

    def _run(self, context: ExecutionContext, shapes: Shapes, logits: Float32Array) -> None:
        """Put a staged step on the stream, with its copies."""
        (num_tokens,) = shapes["position_ids"]
        self._buffers.send(shapes)
        self._links.copy_in(num_tokens)
        context.enqueue()
        self._links.copy_out(num_tokens)
        self._logits.copy_out(logits)

    def _capture(self, size: int) -> CapturedWork:
        arrays = self._arrays(self._batches.padding(size))
        shapes = self._shapes(arrays)
        context, logits = self._decode_contexts[size], self._logits.rows(size)
        self._buffers.stage(arrays)
        context.set_shapes(shapes)
        self._run(context, shapes, logits)  # what is loaded or allocated by its first use is there then
        self._stream.synchronize()
        return self._stream.capture(lambda: self._run(context, shapes, logits))

    def _decode_profile(self, size: int) -> int:
        return profile_for(self._profiles, shapes_of(self._arrays(self._batches.padding(size))))

    def _allocate_caches(self, layout: KVCacheLayout) -> list[_LayerCache]:
        caches = []
        for index, layer in enumerate(layout.layers):
            num_elements = 2 * layout.block_size * layer.num_kv_heads * layer.head_dim
            block_bytes = num_elements * element_bytes(layout.dtype)
            what = f"the KV cache of layer {index}"
            host_bytes = self._spec.num_host_blocks * block_bytes
            host = self._stream.allocate_pinned(host_bytes, f"the swap space of layer {index}")
            address = self._stream.allocate(layout.num_blocks * block_bytes, what)
            caches.append(_LayerCache(address, block_bytes, host.reshape(-1, block_bytes)))
        return caches

    def _bind(self, context: ExecutionContext, layout: KVCacheLayout) -> None:
        """Addresses of all tensors, and the shapes that are the same in every step."""
        context.bind(self._addresses)
        for index, (layer, cache) in enumerate(zip(layout.layers, self._caches, strict=True)):
            name = wire.kv_cache_input(index)
            context.bind({name: cache.address, wire.kv_cache_output(index): cache.address})
            shape = (layout.num_blocks, 2, layout.block_size, layer.num_kv_heads, layer.head_dim)
            context.set_shapes({name: shape})


def _array_names(communicator: Communicator | None) -> tuple[str, ...]:
    """The arrays of a step that a rank's engine reads; that of a model's only rank reads all."""
    is_first = communicator is None or communicator.is_first
    is_last = communicator is None or communicator.is_last
    inputs = wire.stage_inputs(is_first=is_first, is_last=is_last)
    return tuple(name for name in inputs if name != wire.HIDDEN_STATES)

"""Runs the packed graph on the CPU with OpenVINO."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from trtforge import wire
from trtforge.errors import CapacityError, ConfigError, EngineBuildError, ServerError
from trtforge.manifest import DType, KVCacheLayout, Manifest
from trtforge.runtime.executor import KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.cache_arrays import move_blocks
from trtforge.runtime.executors.openvino_all_reduce import RankSums
from trtforge.runtime.executors.openvino_graph import (
    BLOCK_SIZE,
    key_cache_input,
    read_graph,
    value_cache_input,
)
from trtforge.runtime.executors.step_checks import check_step, require
from trtforge.runtime.parallel.communicator import Communicator
from trtforge.runtime.scheduling.block_moves import BlockMoves

logger = logging.getLogger(__name__)

_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}  # as Linux names them

# float16 is not among them: the CPU plugin takes it as a hint and computes wrong results.
_PRECISIONS: Mapping[DType, str] = {"float32": "f32", "bfloat16": "bf16"}


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def multiplies_integers() -> bool:
    """Whether this CPU adds products of bytes up in 32 bits, as those with VNNI do. On others OpenVINO adds
    two of them in 16 bits, which overflow."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return not _VNNI.isdisjoint(flags)


class OpenVINOExecutor:
    """Executes a built model on OpenVINO's CPU plugin.

    The plugin's attention operator finds the slots of new tokens through the block tables by itself, so
    slot_mapping can only confirm them: every new token is stored, at the slot that its block table names.
    """

    def __init__(
        self,
        model_dir: Path,
        manifest: Manifest,
        *,
        threads: int,
        num_host_blocks: int = 0,
        communicator: Communicator | None = None,
    ) -> None:
        """Load the graph in `model_dir` and allocate its cache; `threads` 0 takes all cores allowed. Of a
        model on several ranks, `manifest` is this one's alone and `communicator` leads to the others.

        Raises ConfigError for a manifest or number of threads that OpenVINO cannot serve, EngineBuildError
        if it does not take the graph, and CapacityError if there is no memory for the cache.
        """
        _check_manifest(manifest)
        if threads < 0:
            raise ConfigError(f"threads is {threads}: give a number from 1, or 0 for all cores")
        num_cores = len(os.sched_getaffinity(0))
        threads = min(threads or num_cores, num_cores)  # OpenVINO starts no more either
        self._vocab_size = manifest.model.vocab_size
        self._spec = KVCacheSpec(BLOCK_SIZE, manifest.kv_cache.num_blocks, num_host_blocks)
        path = model_dir / manifest.ranks[0].onnx
        dtype = manifest.dtype
        if dtype == "bfloat16" and not has_bfloat16():
            logger.warning(
                "this CPU has no bfloat16: computing in float32, with a KV cache of twice the size"
            )
            dtype = "float32"
        # In one thread the plugin's fused bfloat16 MLP divides by zero, which ends the process. It does
        # not fuse MLPs whose weights are [in, out].
        transpose_weights = threads == 1 and dtype == "bfloat16"
        self._communicator = communicator
        self._is_first = communicator is None or communicator.is_first
        self._is_last = communicator is None or communicator.is_last
        self._sums = None if communicator is None else RankSums(communicator)
        model = read_graph(
            path,
            manifest.kv_cache.layers,
            transpose_weights=transpose_weights,
            multiply_integers=multiplies_integers(),
            sums=self._sums,
        )
        config = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
            "KV_CACHE_PRECISION": "u8" if manifest.kv_cache.dtype == "int8" else _PRECISIONS[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            # A pinned thread waits for its core while another process uses it, and the other threads for
            # it; the server's own processes are enough for that.
            "ENABLE_CPU_PINNING": False,
        }
        if manifest.dtype == "float32":
            # Else the plugin rounds activations to 8 bits for weights of integers, which is faster.
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        # Of what comes from the stage before this one.
        self._hidden_size = 0 if self._is_first else _hidden_size(model)
        try:
            request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
        except RuntimeError as error:
            raise EngineBuildError(
                f"OpenVINO {ov.__version__} cannot compile {path} for this CPU; try a build with --dtype "
                f"float32. OpenVINO says: {error}"
            ) from error
        self._caches = _bind_cache(request, manifest.kv_cache)
        self._host_caches = [
            np.empty((num_host_blocks, *cache.data.shape[1:]), cache.data.dtype) for cache in self._caches
        ]
        self._request: ov.InferRequest | None = request
        self._feeds: dict[str, npt.NDArray[Any]] = {}
        logger.info("%s: %s, %d threads, %s", path, dtype, threads, self._spec)

    def kv_cache_spec(self) -> KVCacheSpec:
        """The cache as the manifest has it."""
        return self._spec

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move keys and values of all layers."""
        for cache, host_cache in zip(self._caches, self._host_caches, strict=True):
            move_blocks(moves, cache.data, host_cache)

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Run one step.

        Raises ValueError, before anything is stored, for inputs that contradict each other or point
        outside the cache or the vocabulary, and ServerError if OpenVINO or another rank fails. A rank's
        logits are those of its columns; of a stage that is not the last there are none.
        """
        if self._request is None:
            raise ServerError("the executor is closed")
        num_new = np.diff(inputs.cu_seqlens)
        past_lens = inputs.context_lens - num_new
        num_blocks_used = -(-inputs.context_lens // BLOCK_SIZE)
        check_step(inputs, self._spec, self._vocab_size)
        all_stored = bool((inputs.slot_mapping >= 0).all())
        require(all_stored, "slot_mapping has negative slots, and OpenVINO stores every token")
        block_indices_begins = np.zeros_like(inputs.cu_seqlens)
        np.cumsum(num_blocks_used, out=block_indices_begins[1:])
        used = np.arange(inputs.block_tables.shape[1]) < num_blocks_used[:, None]
        # Kept until the next step: OpenVINO reads the arrays where they are.
        self._feeds = {
            **self._token_feeds(inputs),
            "past_lens": past_lens,
            "subsequence_begins": inputs.cu_seqlens,
            "block_indices": inputs.block_tables[used],
            "block_indices_begins": block_indices_begins,
            "max_context_len": np.asarray(inputs.context_lens.max()),
        }
        try:
            for name, array in self._feeds.items():
                self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise ServerError(
                f"OpenVINO failed in a step of {len(inputs.input_ids)} tokens: {error}"
            ) from error
        if self._sums is not None:
            self._sums.check()
        out = self._request.get_tensor(wire.stage_output(is_last=self._is_last)).data
        if self._communicator is None or self._is_last:
            return ModelOutputs(logits=out)
        self._communicator.send(out)
        return ModelOutputs(logits=np.empty((len(inputs.logits_indices), 0), np.float32))

    def _token_feeds(self, inputs: ModelInputs) -> dict[str, npt.NDArray[Any]]:
        """Inputs of this stage's graph; waits for the stage before it, if there is one."""
        feeds: dict[str, npt.NDArray[Any]] = {"position_ids": inputs.position_ids}
        if self._is_last:
            feeds["logits_indices"] = inputs.logits_indices
        if self._communicator is None or self._is_first:
            feeds["input_ids"] = inputs.input_ids
        else:
            hidden_states = np.empty((len(inputs.input_ids), self._hidden_size), np.float32)
            self._communicator.receive(hidden_states)
            feeds[wire.HIDDEN_STATES] = hidden_states
        return feeds

    def close(self) -> None:
        """Release the model and its cache."""
        self._request = None
        self._caches, self._host_caches = [], []


def _check_manifest(manifest: Manifest) -> None:
    cache = manifest.kv_cache
    if manifest.dtype not in _PRECISIONS:
        raise ConfigError(
            f"dtype {manifest.dtype} is computed wrongly by OpenVINO on a CPU: build with --dtype "
            f"{' or '.join(_PRECISIONS)}"
        )
    if cache.dtype not in (manifest.dtype, "int8"):
        raise ConfigError(
            f"OpenVINO has no KV cache of {cache.dtype} for dtype {manifest.dtype}: build the model again"
        )
    if cache.block_size != BLOCK_SIZE:
        raise ConfigError(
            f"OpenVINO's KV cache has blocks of {BLOCK_SIZE} tokens, not {cache.block_size}: build with "
            f"--block-size {BLOCK_SIZE}"
        )


def _hidden_size(model: ov.Model) -> int:
    size: int = model.input(wire.HIDDEN_STATES).get_partial_shape()[1].get_length()
    return size


def _bind_cache(request: ov.InferRequest, layout: KVCacheLayout) -> list[ov.Tensor]:
    """Give the request zeroed caches of the types and shapes that the plugin chose; returns them.

    Raises CapacityError if there is no memory for them; they are written here so that this shows now.
    """
    caches = []
    for layer in range(len(layout.layers)):
        for name in (key_cache_input(layer), value_cache_input(layer)):
            port = request.get_compiled_model().input(name)
            _, *block_shape = port.get_partial_shape()
            shape = ov.Shape([layout.num_blocks, *(size.get_length() for size in block_shape)])
            try:
                cache = ov.Tensor(port.get_element_type(), shape)
            except RuntimeError as error:
                cache_bytes = layout.num_blocks * layout.block_size * layout.bytes_per_token
                raise CapacityError(
                    f"the KV cache of {cache_bytes:,} bytes does not fit into memory: free some, or build "
                    "with a lower --kv-cache-bytes"
                ) from error
            cache.data.view(np.uint8).fill(0)
            request.set_tensor(name, cache)
            caches.append(cache)
    return caches

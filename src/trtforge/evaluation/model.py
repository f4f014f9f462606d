"""A build that is scored: its executor, driven with one sequence at a time, and the time that takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trtforge.checking.packing import PackedSequences
from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.evaluation.windows import Window
from trtforge.manifest import Manifest
from trtforge.runtime.executor import Executor, Float32Array, Int32Array
from trtforge.runtime.executors.create import create_executor

_NAME = "text"
_DECODE_FROM, _NUM_DECODES = 128, 64  # tokens in the cache before the first timed step, timed steps


class LoadedModel:
    """The executor that serves a build, with a cache for one sequence; `name` is for reports."""

    def __init__(self, name: str, manifest: Manifest, executor: Executor) -> None:
        self.name = name
        self.manifest = manifest
        self.num_prefill_tokens = 0
        self.prefill_s = 0.0
        self._executor = executor
        spec = executor.kv_cache_spec()
        self._sequences = PackedSequences(spec.block_size, range(spec.num_blocks))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all ranks' weights on the disk."""
        files = self.manifest.files.items()
        return sum(size for name, size in files if name.endswith(".safetensors"))

    def predict(self, window: Window) -> Float32Array:
        """Logits [N, V] of what stands before each scored token of a window."""
        # Not more tokens in a step than the build was made for.
        step = self.manifest.limits.max_num_batched_tokens
        rows = []
        for start in range(0, len(window.tokens), step):
            end = min(start + step, len(window.tokens))
            wanted = np.arange(max(window.first_scored - 1, start), min(end, len(window.tokens) - 1))
            logits = self._execute(window.tokens[start:end], wanted - start if len(wanted) else None)
            rows.append(logits[: len(wanted)].copy())
        self._sequences.free(_NAME)
        return np.concatenate(rows)

    def time_decodes(self, tokens: Int32Array) -> list[float]:
        """Seconds of decode steps of one sequence, which has the first of `tokens` before them."""
        start = min(_DECODE_FROM, len(tokens) // 2)
        self._execute(tokens[:start], None)
        seconds = []
        for position in range(start, min(start + _NUM_DECODES, len(tokens))):
            inputs = self._sequences.step({_NAME: tokens[position : position + 1].tolist()})
            begin = time.perf_counter()
            self._executor.execute(inputs)
            seconds.append(time.perf_counter() - begin)
        self._sequences.free(_NAME)
        self.num_prefill_tokens, self.prefill_s = 0, 0.0  # the first step was a warm-up
        return seconds

    def _execute(self, tokens: Int32Array, wanted: Int32Array | None) -> Float32Array:
        """Append tokens; logits of those that are `wanted`, or of the last one."""
        rows = [len(tokens) - 1] if wanted is None else wanted.tolist()
        inputs = self._sequences.step({_NAME: tokens.tolist()}, rows)
        begin = time.perf_counter()
        logits = self._executor.execute(inputs).logits
        self.prefill_s += time.perf_counter() - begin
        self.num_prefill_tokens += len(tokens)
        return logits


@contextmanager
def load_model(folder: Path, window: int, *, name: str, threads: int = 0) -> Iterator[LoadedModel]:
    """Load the build in `folder`, called `name` in reports, for sequences of `window` tokens.

    `threads` is the number of a CPU engine's; 0: its own choice.

    Raises ConfigError if it has no graph or no room for such sequences, and what its executor raises.
    """
    manifest = Manifest.load(folder)
    if not manifest.ranks:
        raise ConfigError(f"{name} has no graph: there is nothing to evaluate")
    longest = manifest.limits.max_model_len
    if window > longest:
        raise ConfigError(
            f"--window {window} is more than {name} was built for: its sequences have at most {longest} "
            "tokens"
        )
    num_blocks = -(-window // manifest.kv_cache.block_size)
    cache = manifest.kv_cache.model_copy(update={"num_blocks": num_blocks})
    manifest = manifest.model_copy(update={"kv_cache": cache})
    executor = create_executor(manifest, folder, EngineOptions(threads=threads))
    try:
        yield LoadedModel(name, manifest, executor)
    finally:
        executor.close()

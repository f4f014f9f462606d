"""The engines of all ranks, several at a time where nothing but processors and memory is needed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from trtforge.builder.engine import EngineTarget, OnProgress
from trtforge.builder.engine_cache import EngineCache
from trtforge.builder.rank_engine import build_rank_engine
from trtforge.errors import EngineBuildError
from trtforge.host_memory import available_memory_bytes
from trtforge.manifest import EngineInfo, KVCacheLayout, Limits
from trtforge.plugins.bundle import Bundle

# What a build takes at most, in sizes of the rank's weights, and what it takes without any.
_MEMORY_FACTOR = 3
_OTHER_BYTES = 2**30


def build_rank_engines(
    graphs: Sequence[Path],
    target: EngineTarget,
    limits: Limits,
    kv_cache: KVCacheLayout,
    cache: EngineCache | None,
    on_progress: OnProgress,
    kernels: Bundle | None = None,
    tp_size: int = 1,
) -> list[EngineInfo]:
    """Write the engine of each of `graphs` beside it, as `build_rank_engine` does.

    TensorRT-RTX builds without a GPU: as many at a time as there are processors and memory for. Full TensorRT
    measures kernels on the GPU and builds one after the other. Raises EngineBuildError if one cannot be
    built.
    """
    num_processes = _num_processes(graphs) if target.package == "tensorrt_rtx" else 1
    if num_processes > 1:
        return _build_in_processes(
            graphs, target, limits, kv_cache, cache, on_progress, tp_size, num_processes
        )
    engines = []
    for number, graph in enumerate(graphs):

        def on_part(fraction: float, step: str, done: int = number) -> None:
            name = step if len(graphs) == 1 else f"rank {done}: {step}"
            on_progress((done + fraction) / len(graphs), name)

        engines.append(build_rank_engine(graph, target, limits, kv_cache, cache, on_part, kernels, tp_size))
    return engines


def _num_processes(graphs: Sequence[Path]) -> int:
    largest = max(sum(file.stat().st_size for file in graph.parent.iterdir()) for graph in graphs)
    fitting = available_memory_bytes() // (_MEMORY_FACTOR * largest + _OTHER_BYTES)
    return max(1, min(len(graphs), len(os.sched_getaffinity(0)), fitting))


def _build_in_processes(
    graphs: Sequence[Path],
    target: EngineTarget,
    limits: Limits,
    kv_cache: KVCacheLayout,
    cache: EngineCache | None,
    on_progress: OnProgress,
    tp_size: int,
    num_processes: int,
) -> list[EngineInfo]:
    # Spawned: TensorRT and torch may have threads already, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context)
    futures: list[Future[EngineInfo]] = []
    try:
        for graph in graphs:
            job = (graph, target, limits, kv_cache, cache, _say_nothing, None, tp_size)
            futures.append(pool.submit(build_rank_engine, *job))
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            on_progress(done / len(graphs), f"{done} of {len(graphs)} ranks")
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise EngineBuildError(
            "a process that built an engine crashed or had too little memory: free some, or build on fewer "
            "processors"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _say_nothing(fraction: float, step: str) -> None:
    """Progress of one of several builds."""

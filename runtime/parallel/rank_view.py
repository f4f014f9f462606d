"""A model as one of its ranks has it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath

from trtforge.engine_options import EngineOptions
from trtforge.manifest import Manifest, cache_bytes_per_token
from trtforge.runtime.executors.memory_budget import MemoryBudget, plan_memory
from trtforge.runtime.parallel.communicator import Communicator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankContext:
    """What a rank's executor has of its group."""

    communicator: Communicator
    cache_share: Fraction  # its part of what all ranks keep for a token
    node_share: Fraction  # its part of what those on its machine keep
    device: int  # which of the GPUs that it sees it has
    # From what this rank has room for to what all have room for; waits for the others.
    agree: Callable[[MemoryBudget], MemoryBudget]


def rank_manifest(manifest: Manifest, rank: int) -> Manifest:
    """The manifest as if `rank` was all there is: its graph, its caches and its files."""
    own = manifest.ranks[rank]
    folder = PurePosixPath(own.onnx).parent
    files = {name: size for name, size in manifest.files.items() if folder in PurePosixPath(name).parents}
    layout = manifest.kv_cache.model_copy(update={"layers": own.kv_layers})
    changes = {"ranks": (own,), "tp_size": 1, "pp_size": 1, "kv_cache": layout, "files": files}
    return manifest.model_copy(update=changes)


def cache_share(manifest: Manifest, rank: int, ranks: Sequence[int]) -> Fraction:
    """Which part of what `ranks` keep for a token is kept by `rank`, one of them."""
    sizes = [cache_bytes_per_token(one.kv_layers, manifest.kv_cache.dtype) for one in manifest.ranks]
    return Fraction(sizes[rank], sum(sizes[one] for one in ranks))


def share_threads(options: EngineOptions, num_ranks: int) -> EngineOptions:
    """The options of one of `num_ranks` ranks on the cores of one machine that this process may use."""
    num_cores = len(os.sched_getaffinity(0))
    threads = max(1, (options.threads or num_cores) // num_ranks)
    return options.model_copy(update={"threads": threads})


def _share_host_memory(options: EngineOptions, context: RankContext, *, cache_on_host: bool) -> EngineOptions:
    """The options of one of several ranks: it takes its share of what all may take, and of its machine.

    On GPUs, `cache_on_host` False, each rank has memory of its own for its cache.
    """
    share = context.cache_share
    changes: dict[str, object] = {"swap_bytes": int(options.swap_bytes * share)}
    if cache_on_host:
        # Not 0 for a little: that is no cap at all.
        changes["kv_cache_bytes"] = math.ceil(options.kv_cache_bytes * share)
        changes["kv_cache_fraction"] = options.kv_cache_fraction * float(context.node_share)
    return options.model_copy(update=changes)


def plan_rank_memory(
    manifest: Manifest,
    options: EngineOptions,
    available_bytes: int,
    context: RankContext | None,
    *,
    cache_on_host: bool = True,
    step_bytes: int = 0,
) -> MemoryBudget:
    """The cache of a model's only rank, or what all ranks have room for. Raises ConfigError for none."""
    if context is not None:
        options = _share_host_memory(options, context, cache_on_host=cache_on_host)
    budget = plan_memory(manifest, options, available_bytes, step_bytes=step_bytes)
    if context is not None:
        budget = context.agree(budget)
    logger.info("%s", budget)
    return budget

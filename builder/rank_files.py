"""What the ranks of a build consist of: graphs, weights, kernels and engines, a folder each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trtforge.builder.engine_cache import EngineCache
from trtforge.builder.plan import BuildPlan
from trtforge.builder.stages import Stages
from trtforge.builder.verify import verify_graph
from trtforge.manifest import KERNELS_FOLDER, EngineInfo, KVCacheLayout, Rank

if TYPE_CHECKING:
    from trtforge.builder.export import ExportedModel

# Imports of functions take seconds, which a cache hit does without.


def write_ranks(
    exported: Sequence[ExportedModel],
    plan: BuildPlan,
    kv_cache: KVCacheLayout,
    cache: EngineCache | None,
    version: Path,
    stages: Stages,
) -> tuple[tuple[Rank, ...], dict[Path, str]]:
    """Write all that the ranks of `exported` need into folders in `version`. Returns the ranks, and the
    SHA-256 of the large files: they were hashed while they were written.

    Raises EngineBuildError for a graph that is not valid or cannot become an engine.
    """
    graphs, digests = _write_graphs(exported, plan, version, stages)
    engines = _build_engines(graphs, plan, kv_cache, cache, version, stages)
    digests |= {version / engine.file: engine.sha256 for engine in engines if engine is not None}
    ranks = tuple(
        Rank(
            onnx=graph.relative_to(version).as_posix(),
            kv_layers=rank.layers,
            logits_columns=rank.logits_columns,
            engine=engine,
        )
        for rank, graph, engine in zip(exported, graphs, engines, strict=True)
    )
    return ranks, digests


def _write_graphs(
    exported: Sequence[ExportedModel], plan: BuildPlan, version: Path, stages: Stages
) -> tuple[list[Path], dict[Path, str]]:
    from trtforge.builder.export import ONNX_FILE, write_graph

    graphs = [version / f"rank{number}" / ONNX_FILE for number in range(len(exported))]
    total = sum(rank.weight_bytes for rank in exported)
    with stages.stage("write graph and weights") as stage:
        before = 0
        digests: dict[Path, str] = {}
        for rank, graph in zip(exported, graphs, strict=True):

            def on_bytes(done: int, _: int, start: int = before) -> None:
                stage.on_progress(start + done, total)

            digests |= write_graph(rank, graph.parent, on_bytes=on_bytes)
            before += rank.weight_bytes
    with stages.stage("check graph"):
        for number, (rank, graph) in enumerate(zip(exported, graphs, strict=True)):
            pp_rank = number // plan.parallelism.tp
            is_last = pp_rank == plan.parallelism.pp - 1
            verify_graph(graph, len(rank.layers), is_first=pp_rank == 0, is_last=is_last)
    return graphs, digests


def _build_engines(
    graphs: Sequence[Path],
    plan: BuildPlan,
    kv_cache: KVCacheLayout,
    cache: EngineCache | None,
    version: Path,
    stages: Stages,
) -> Sequence[EngineInfo | None]:
    """The engines, each with its graph's number; None for a runtime without engines."""
    if plan.target is None:
        return [None] * len(graphs)
    kernels = None
    if plan.runtime == "tensorrt":
        with stages.stage("compile kernels") as stage:
            from trtforge.builder.plugin_graph import compile_kernels

            kernels = compile_kernels(
                graphs,
                plan.block_size,
                plan.target.compute_capabilities,
                version / KERNELS_FOLDER,
                stage.on_progress,
            )
    with stages.stage("build engine") as stage:
        from trtforge.builder.rank_engines import build_rank_engines

        return build_rank_engines(
            graphs,
            plan.target,
            plan.limits,
            kv_cache,
            cache,
            stage.on_fraction,
            kernels,
            plan.parallelism.tp,
        )

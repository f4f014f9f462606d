"""A rank's engine: its graph lowered for TensorRT, then built or taken from the cache."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import onnx_ir as ir

from trtforge.builder.engine import EngineTarget, Network, OnProgress, check_fp8
from trtforge.builder.engine_cache import BuiltEngine, EngineCache, EngineRecipe, write_engine
from trtforge.builder.lower import lower
from trtforge.builder.plugin_graph import lower_for_plugins, register_plugins
from trtforge.builder.profiles import make_profiles
from trtforge.integrity import file_digest
from trtforge.manifest import EngineInfo, KVCacheLayout, Limits, Profile
from trtforge.plugins.bundle import Bundle

ENGINE_FILE = "model.engine"

logger = logging.getLogger(__name__)


def build_rank_engine(
    graph: Path,
    target: EngineTarget,
    limits: Limits,
    kv_cache: KVCacheLayout,
    cache: EngineCache | None,
    on_progress: OnProgress,
    kernels: Bundle | None = None,
    tp_size: int = 1,
) -> EngineInfo:
    """Write the engine of the ONNX file `graph`, which the builder wrote, beside it, and its facts. `tp_size`
    ranks share its layers.

    With `kernels` the operators that have some become plugins, as only full TensorRT takes them; they are
    registered for this process. Raises EngineBuildError if TensorRT cannot build it. Paths in the result are
    relative to the folder above the rank's.
    """
    on_progress(0.0, "lower graph")
    if kernels is None:
        model = lower(graph, kv_cache.block_size, tp_size=tp_size)
        if any(value.dtype == ir.DataType.FLOAT8E4M3FN for value in model.graph.initializers.values()):
            check_fp8(target)
        proto = ir.to_proto(model)
    else:
        model, proto = lower_for_plugins(graph, kv_cache.block_size, tp_size)
        register_plugins(target.package, kernels)
    serialized = proto.SerializeToString(deterministic=True)
    profiles = make_profiles(target.package, limits, kv_cache)

    def build() -> BuiltEngine:
        network = Network(serialized, graph, target.package)
        return BuiltEngine(network.build(target, profiles, on_progress), network.facts())

    file = graph.with_name(ENGINE_FILE)
    if cache is None:
        written = write_engine(build(), file)
    else:
        on_progress(0.0, "hash weights")
        written = cache.write(_recipe(model, serialized, graph, target, profiles), file, build)
        if written.cached:
            logger.info("the engine was in the cache")
    return EngineInfo(
        file=file.relative_to(graph.parents[1]).as_posix(),
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        package=target.package,
        version=target.version,
        compute_capabilities=target.compute_capabilities,
        profiles=profiles,
    )


def _recipe(
    model: ir.Model, serialized: bytes, graph: Path, target: EngineTarget, profiles: tuple[Profile, ...]
) -> EngineRecipe:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    files = sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})
    return EngineRecipe(
        graph_sha256=hashlib.sha256(serialized).hexdigest(),
        weights_sha256={file: file_digest(graph.with_name(file)) for file in files},
        package=target.package,
        version=target.version,
        compute_capabilities=target.compute_capabilities,
        profiles=profiles,
        workspace_bytes=target.workspace_bytes,
        weight_streaming=target.weight_streaming,
    )

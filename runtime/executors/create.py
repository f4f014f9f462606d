"""Chooses the executor that a built model was made for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError, TrtforgeError
from trtforge.host_memory import available_memory_bytes
from trtforge.manifest import KERNELS_FOLDER, Manifest
from trtforge.runtime.executor import Executor
from trtforge.runtime.executors.memory_budget import resize
from trtforge.runtime.parallel.rank_view import RankContext, plan_rank_memory
from trtforge.tensorrt_package import PACKAGES


def create_executor(
    manifest: Manifest,
    model_dir: Path,
    options: EngineOptions,
    on_failure: Callable[[TrtforgeError], None] | None = None,
) -> Executor:
    """The executor for `manifest.runtime`, with the model in `model_dir` loaded. If it fails while nobody has
    called it, `on_failure` is called in another thread.

    Raises ConfigError for a runtime that this version or this machine cannot execute, and for a cache that
    cannot be had. A runtime's own packages are imported only if it is the one. A model on several ranks has
    processes of its own, which end with the thread that calls this.
    """
    if len(manifest.ranks) > 1:
        from trtforge.runtime.parallel.parallel_executor import ParallelExecutor

        return ParallelExecutor(model_dir, manifest, options, on_failure)
    return create_rank_executor(manifest, model_dir, options)


def create_rank_executor(
    manifest: Manifest, model_dir: Path, options: EngineOptions, context: RankContext | None = None
) -> Executor:
    """The executor of a model's only rank, or of one of several: `manifest` is its own then."""
    if manifest.runtime == "reference":
        return _create_reference_executor(manifest, model_dir, options, context)
    if manifest.runtime in PACKAGES:
        return _create_tensorrt_executor(manifest, model_dir, options, context)
    budget = plan_rank_memory(manifest, options, available_memory_bytes(), context)
    if manifest.runtime == "openvino":
        from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor

        return OpenVINOExecutor(
            model_dir,
            manifest.model_copy(update={"kv_cache": resize(manifest.kv_cache, budget)}),
            threads=options.threads,
            num_host_blocks=budget.num_host_blocks,
            communicator=context.communicator if context else None,
        )
    if manifest.runtime == "fake":
        from trtforge.runtime.executors.fake_executor import FakeExecutor

        return FakeExecutor(
            manifest.model.vocab_size,
            budget.num_blocks,
            budget.block_size,
            num_host_blocks=budget.num_host_blocks,
            window=manifest.kv_cache.window,
            columns=manifest.ranks[0].logits_columns if context else None,
        )
    raise ConfigError(f"{model_dir} was built for the runtime {manifest.runtime!r}, which nothing executes")


def _create_tensorrt_executor(
    manifest: Manifest, model_dir: Path, options: EngineOptions, context: RankContext | None
) -> Executor:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise ConfigError(
            f"{model_dir} was built for {manifest.runtime}, and serving an engine needs the package "
            "cuda-bindings: pip install 'trtforge[gpu]'"
        )
    from trtforge.runtime.executors.tensorrt_executor import TensorRTExecutor

    return TensorRTExecutor(model_dir, manifest, options, kernels=model_dir / KERNELS_FOLDER, context=context)


def _create_reference_executor(
    manifest: Manifest, model_dir: Path, options: EngineOptions, context: RankContext | None
) -> Executor:
    """On the GPU, if there is one, with the kernels that are in the model's folder."""
    from trtforge.runtime.executors.reference_executor import (
        RankLinks,
        ReferenceExecutor,
        available_device_bytes,
        default_device,
    )

    communicator = context.communicator if context else None
    device = default_device(context.device if context else 0)
    launcher = None
    if device.type == "cuda" and (model_dir / KERNELS_FOLDER).is_dir():
        from trtforge.plugins.bundle import Bundle
        from trtforge.plugins.launcher import Launcher

        launcher = Launcher(Bundle.load(model_dir / KERNELS_FOLDER))
    budget = plan_rank_memory(
        manifest, options, available_device_bytes(device), context, cache_on_host=device.type == "cpu"
    )
    links = RankLinks.of(communicator, device, options.step_timeout_s) if communicator else None
    return ReferenceExecutor(
        model_dir,
        manifest.model_copy(update={"kv_cache": resize(manifest.kv_cache, budget)}),
        device=device,
        launcher=launcher,
        threads=options.threads,
        num_host_blocks=budget.num_host_blocks,
        rank_links=links,
    )

"""Chooses the executor that a built model was made for."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.manifest import KERNELS_FOLDER, Manifest
from trtforge.runtime.executor import Executor
from trtforge.runtime.executors.memory_budget import available_memory_bytes, plan_memory, resize
from trtforge.tensorrt_package import PACKAGES

logger = logging.getLogger(__name__)


def create_executor(manifest: Manifest, model_dir: Path, options: EngineOptions) -> Executor:
    """The executor for `manifest.runtime`, with the model in `model_dir` loaded.

    Raises ConfigError for a runtime that this version or this machine cannot execute, and for a cache that
    cannot be had. A runtime's own packages are imported only if it is the one.
    """
    if manifest.runtime == "reference":
        return _create_reference_executor(manifest, model_dir, options)
    if manifest.runtime in PACKAGES:
        return _create_tensorrt_executor(manifest, model_dir, options)
    budget = plan_memory(manifest, options, available_memory_bytes())
    logger.info("%s", budget)
    if manifest.runtime == "openvino":
        from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor

        manifest = manifest.model_copy(update={"kv_cache": resize(manifest.kv_cache, budget)})
        return OpenVINOExecutor(
            model_dir, manifest, threads=options.threads, num_host_blocks=budget.num_host_blocks
        )
    if manifest.runtime == "fake":
        from trtforge.runtime.executors.fake_executor import FakeExecutor

        return FakeExecutor(
            manifest.model.vocab_size,
            budget.num_blocks,
            budget.block_size,
            num_host_blocks=budget.num_host_blocks,
            window=manifest.kv_cache.window,
        )
    raise ConfigError(f"{model_dir} was built for the runtime {manifest.runtime!r}, which nothing executes")


def _create_tensorrt_executor(manifest: Manifest, model_dir: Path, options: EngineOptions) -> Executor:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise ConfigError(
            f"{model_dir} was built for {manifest.runtime}, and serving an engine needs the package "
            "cuda-bindings: pip install 'trtforge[gpu]'"
        )
    from trtforge.runtime.executors.tensorrt_executor import TensorRTExecutor

    return TensorRTExecutor(model_dir, manifest, options, kernels=model_dir / KERNELS_FOLDER)


def _create_reference_executor(manifest: Manifest, model_dir: Path, options: EngineOptions) -> Executor:
    """On the GPU, if there is one, with the kernels that are in the model's folder."""
    from trtforge.runtime.executors.reference_executor import (
        ReferenceExecutor,
        available_device_bytes,
        default_device,
    )

    device = default_device()
    launcher = None
    if device.type == "cuda" and (model_dir / KERNELS_FOLDER).is_dir():
        from trtforge.plugins.bundle import Bundle
        from trtforge.plugins.launcher import Launcher

        launcher = Launcher(Bundle.load(model_dir / KERNELS_FOLDER))
    budget = plan_memory(manifest, options, available_device_bytes(device))
    logger.info("%s", budget)
    return ReferenceExecutor(
        model_dir,
        manifest.model_copy(update={"kv_cache": resize(manifest.kv_cache, budget)}),
        device=device,
        launcher=launcher,
        threads=options.threads,
        num_host_blocks=budget.num_host_blocks,
    )

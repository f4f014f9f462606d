"""Chooses the executor that a built model was made for."""

from __future__ import annotations

from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.manifest import Manifest
from trtforge.runtime.executor import Executor


def create_executor(manifest: Manifest, model_dir: Path, options: EngineOptions) -> Executor:
    """The executor for `manifest.runtime`, with the model in `model_dir` loaded.

    Raises ConfigError for a runtime that this version or this machine cannot execute. A runtime's own
    packages are imported only if it is the one.
    """
    if manifest.runtime == "openvino":
        from trtforge.runtime.openvino_executor import OpenVINOExecutor

        return OpenVINOExecutor(model_dir, manifest, threads=options.threads)
    if manifest.runtime == "fake":
        from trtforge.runtime.fake_executor import FakeExecutor

        cache = manifest.kv_cache
        return FakeExecutor(manifest.model.vocab_size, cache.num_blocks, cache.block_size)
    raise ConfigError(
        f"{model_dir} was built for the runtime {manifest.runtime!r}, which cannot be served yet: "
        "build it with --runtime openvino"
    )

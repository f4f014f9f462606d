"""Runs the same steps through ONNX Runtime and through the runtimes that serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast, get_args

from trtforge.checking.onnxruntime_model import OnnxRuntimeModel
from trtforge.checking.runtime_names import OfAnyBuild
from trtforge.checking.schedule import Step
from trtforge.engine_options import EngineOptions
from trtforge.manifest import Manifest, Runtime
from trtforge.runtime.executor import Float32Array, ModelInputs, ModelOutputs
from trtforge.runtime.executors.create import create_executor


class _Model(Protocol):
    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Run one step."""
        ...


def candidates(manifest: Manifest) -> tuple[str, ...]:
    """Names of the runtimes that may take the build, its own first."""
    return tuple(dict.fromkeys((manifest.runtime, *get_args(OfAnyBuild))))


def run(name: str, model_dir: Path, manifest: Manifest, steps: Sequence[Step]) -> list[Float32Array]:
    """Logits of each step by the runtime called `name`.

    Raises ConfigError if that runtime does not take the build, and what else `OnnxRuntimeModel` and
    `create_executor` raise.
    """
    if name == "onnxruntime":
        return _logits(OnnxRuntimeModel(model_dir, manifest), steps)
    manifest = manifest.model_copy(update={"runtime": cast(Runtime, name)})
    executor = create_executor(manifest, model_dir, EngineOptions())
    try:
        return _logits(executor, steps)
    finally:
        executor.close()


def _logits(model: _Model, steps: Sequence[Step]) -> list[Float32Array]:
    return [model.execute(step.inputs).logits.copy() for step in steps]

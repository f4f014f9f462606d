"""Checks of a serialized engine before anything tries to load it.

TensorRT says little about an engine that it does not take, and some of it only in its log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtforge.errors import ConfigError
from trtforge.integrity import file_digest
from trtforge.manifest import EngineInfo, Manifest


@dataclass(frozen=True, slots=True)
class EngineHost:
    """What wants to load an engine: a TensorRT package and the GPU's compute capability, such as 8.9."""

    package: str
    version: str
    compute_capability: str


def engine_of(folder: Path, manifest: Manifest, rank: int) -> EngineInfo:
    """What the manifest in `folder` says about the engine of `rank`.

    Raises ConfigError if there is none, and says how to build one.
    """
    model = f"the model in {folder}"
    if rank >= len(manifest.ranks):
        raise ConfigError(
            f"{model} has {len(manifest.ranks)} ranks, and rank {rank} was asked for: build it again with "
            f"build-engine --tp {rank + 1}, or start as many ranks as it has"
        )
    engine = manifest.ranks[rank].engine
    if engine is None:
        raise ConfigError(
            f"rank {rank} of {model} was built for {manifest.runtime} and has no engine: build it again with "
            "build-engine --runtime tensorrt or tensorrt-rtx"
        )
    return engine


def check_engine(folder: Path, manifest: Manifest, rank: int, host: EngineHost) -> Path:
    """The engine file of `rank` in `folder`, which holds the manifest; `host` can load it.

    Reads the whole file once. Raises ConfigError that says what does not match and how to build it again.
    """
    engine = engine_of(folder, manifest, rank)
    _check_host(f"the engine of rank {rank} of the model in {folder}", engine, host)
    path = folder / engine.file
    _check_file(path, engine)
    return path


def _check_host(subject: str, engine: EngineInfo, host: EngineHost) -> None:
    if engine.package != host.package:
        raise ConfigError(
            f"{subject} was built by {engine.package}, which {host.package} cannot load: serve it where "
            f"{engine.package} is installed, or build it again with build-engine --runtime "
            f"{host.package.replace('_', '-')}"
        )
    if engine.version != host.version:
        raise ConfigError(
            f"{subject} was built by {engine.package} {engine.version}, and {host.version} is installed, "
            f"which loads its own engines only: pip install {engine.package}=={engine.version}, or run the "
            "same build-engine command again here"
        )
    if host.compute_capability not in engine.compute_capabilities:
        raise ConfigError(
            f"{subject} was built for GPUs of compute capability {', '.join(engine.compute_capabilities)}, "
            f"and this one has {host.compute_capability}: build it again with build-engine --gpu "
            f"sm_{host.compute_capability.replace('.', '')}"
        )


def _check_file(path: Path, engine: EngineInfo) -> None:
    again = "copy it here again, or run the same build-engine command again"
    if not path.is_file():
        raise ConfigError(f"the engine {path} is missing: {again}")
    size_bytes = path.stat().st_size
    if size_bytes != engine.size_bytes:
        raise ConfigError(
            f"the engine {path} has {size_bytes} bytes, and {engine.size_bytes} were built: {again}"
        )
    if file_digest(path) != engine.sha256:
        raise ConfigError(f"the engine {path} is not what was built, its sha256 is another one: {again}")

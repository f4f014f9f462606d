"""What is said of an engine: by its manifest, by the build, and by TensorRT where it can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtforge.builder.engine_facts import EngineFacts, read_facts
from trtforge.builder.inspection.graph_facts import Facts
from trtforge.builder.loaded_engine import loaded_information
from trtforge.errors import ConfigError
from trtforge.manifest import MANIFEST_FILE, EngineInfo, Manifest

SUFFIXES = (".engine", ".plan")


class EngineInspection(Facts):
    """One engine. `network` is what it was built from, `loaded` what TensorRT says of its layers."""

    file: str
    info: EngineInfo
    network: EngineFacts | None
    loaded: Any | None

    @classmethod
    def of(cls, file: Path, info: EngineInfo) -> EngineInspection:
        """Inspect the engine file that `info` describes; raises ConfigError if its facts are not readable."""
        loaded = loaded_information(file, info) if file.is_file() else None
        return cls(file=str(file), info=info, network=read_facts(file), loaded=loaded)


def find_engine_info(file: Path) -> EngineInfo:
    """What the manifest in a folder above says of an engine; raises ConfigError if there is none."""
    file = file.resolve()
    for folder in file.parents[:2]:
        if not (folder / MANIFEST_FILE).is_file():
            continue
        for rank in Manifest.load(folder).ranks:
            if rank.engine is not None and (folder / rank.engine.file) == file:
                return rank.engine
    raise ConfigError(
        f"{file} is an engine of which no manifest beside it says what it is: give it in its build"
    )

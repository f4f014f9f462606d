"""What is known of an engine that nobody can look into: its network before it was built, kept beside it.

Without a GPU an engine cannot be loaded, and with one only by the package that built it.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trtforge.errors import ConfigError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineTensor(_Frozen):
    """An input or output as TensorRT sees it. Dims without a fixed size have their name, or -1."""

    name: str
    dtype: str  # as numpy calls it
    dims: tuple[str | int, ...]


class EngineLayers(_Frozen):
    """How many layers of one type there are whose first output has one dtype."""

    type: str  # as TensorRT calls it, in lower case
    dtype: str
    count: int


class EngineFacts(_Frozen):
    """The network as TensorRT's parser made it, before layers were fused."""

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    layers: tuple[EngineLayers, ...]  # the most frequent first

    @property
    def num_layers(self) -> int:
        """All layers."""
        return sum(layers.count for layers in self.layers)


def facts_file(engine: Path) -> Path:
    """Where the facts of an engine are."""
    return engine.with_name(engine.name + ".json")


def write_facts(facts: EngineFacts, engine: Path) -> None:
    """Write them beside the engine."""
    facts_file(engine).write_text(facts.model_dump_json(indent=2) + "\n")


def read_facts(engine: Path) -> EngineFacts | None:
    """Read them; None if there are none. Raises ConfigError for a file that is something else."""
    file = facts_file(engine)
    try:
        return EngineFacts.model_validate_json(file.read_text())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} does not hold the facts of an engine: {error}") from error

"""What a part of the GPU verification is and says. Each runs in a process of its own: an error on the device
ends all that the process does there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """Figures; None is one that could not be had."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a part found. It passed if there are no problems."""

    problems: Sequence[str] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[str] = ()  # sentences for the report


@dataclass(frozen=True, slots=True)
class Settings:
    """What every part is told."""

    bundle: Path  # of the kernels that `kernels_part.py` compiled
    model: Path | None  # a Hugging Face folder of a small real model


def run_part(description: str | None, part: Callable[[Settings], Outcome]) -> None:
    """The main function of a part: its outcome becomes a JSON file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--bundle", type=Path, required=True, help="folder of compiled kernels")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a small real model")
    parser.add_argument("--outcome", type=Path, required=True, help="where to write the outcome, as JSON")
    arguments = parser.parse_args()
    outcome = part(Settings(bundle=arguments.bundle, model=arguments.model))
    arguments.outcome.write_text(json.dumps(asdict(outcome)))

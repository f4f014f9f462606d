"""What every benchmark ends with: one JSON line for its headline figure, a file with all of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number, and the number it should reach if there is one."""

    name: str
    value: float
    unit: str
    aim: float | None = None
    higher_is_better: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; None without an aim."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.higher_is_better else self.value <= self.aim

    def as_dict(self) -> dict[str, object]:
        """{name, value, unit, aim, met}, rounded to what is worth printing."""
        value = float(f"{self.value:.4g}")
        return {"name": self.name, "value": value, "unit": self.unit, "aim": self.aim, "met": self.met}


def describe_machine(packages: Sequence[str] = ()) -> dict[str, object]:
    """Processor, memory and system as they are seen here, and the versions of `packages`."""
    return {
        "cpu": _first_field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def finish(
    headline: Figure, figures: Sequence[Figure], machine: Mapping[str, object], json_file: Path | None
) -> None:
    """Write everything to `json_file` if it is given, then print the headline as the last line."""
    if json_file is not None:
        content = {"machine": machine, "figures": [figure.as_dict() for figure in (headline, *figures)]}
        json_file.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(headline.as_dict()), flush=True)


def _first_field(path: str, field: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""docs/gpu.md and gpu.json: what was proved and measured, where, and what failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gpu.part import Cell, Outcome, Table

Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True, slots=True)
class PartReport:
    """How one part went."""

    name: str
    status: Status
    seconds: float
    outcome: Outcome


def write_report(folder: Path, machine: Mapping[str, object], reports: Sequence[PartReport]) -> None:
    """Replace gpu.md and gpu.json in `folder`."""
    content = {"machine": dict(machine), "parts": [asdict(report) for report in reports]}
    (folder / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "gpu.md").write_text("\n".join(_lines(machine, reports)) + "\n")


def _lines(machine: Mapping[str, object], reports: Sequence[PartReport]) -> list[str]:
    lines = ["# On a GPU", "", "Written by `scripts/verify_gpu.sh`.", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "| part | result | seconds |", "|---|---|--:|"]
    lines += [f"| {report.name} | {report.status} | {report.seconds:.0f} |" for report in reports]
    for report in reports:
        lines += ["", f"## {report.name}", ""]
        lines += list(report.outcome.facts)
        for problem in report.outcome.problems:
            lines += ["", "Problem:", "", *(f"    {line}" for line in problem.splitlines())]
        for table in report.outcome.tables:
            lines += ["", *_table(table)]
    return lines


def _table(table: Table) -> list[str]:
    header = "| " + " | ".join(table.columns) + " |"
    rule = "|---" + "|--:" * (len(table.columns) - 1) + "|"
    rows = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return [f"**{table.title}**", "", header, rule, *rows]


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

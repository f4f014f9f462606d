"""Where a report goes: the terminal, and files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trtforge.client.bench.html import render_html
from trtforge.client.bench.report import BenchReport, tables
from trtforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Output:
    """Raises ConfigError for a file that cannot be written: before the run, not when it is over."""

    json_file: Path | None
    html_file: Path | None

    def __post_init__(self) -> None:
        for path in (self.json_file, self.html_file):
            if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
                raise ConfigError(f"cannot write {path}: it has to be a file in a folder that can be written")

    def write(self, report: BenchReport) -> None:
        """Print the tables and the first failures, and write the files."""
        console = Console()
        for table in tables(report):
            console.print(table)
        for run in report.runs:
            for kind, message in run.metrics.first_failures.items():
                console.print(f"{run.label}: first failure of kind {kind}: {message}", markup=False)
        if self.json_file is not None:
            self.json_file.write_text(json.dumps(report.as_dict()) + "\n")
        if self.html_file is not None:
            self.html_file.write_text(render_html(report), encoding="utf-8")

"""The stages of a build: progress while they run, time and peak memory when they are done."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from typing_extensions import Self

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one finished stage took."""

    name: str
    seconds: float
    # Most resident memory while the stage ran, shared file pages included.
    peak_memory_bytes: int
    # True where the system does not let a process reset its peak: then it counts from the process's start.
    peak_is_cumulative: bool


class Stage:
    """The running stage, to report progress on."""

    def __init__(self, progress: Progress, task: TaskID, name: str) -> None:
        self._progress = progress
        self._task = task
        self._name = name

    def describe(self, step: str) -> None:
        """Say which step of the stage is running."""
        self._progress.update(self._task, description=f"{self._name}: {step}")

    def on_progress(self, done: float, total: float) -> None:
        """Say how far the stage is, in any unit; before the first call the bar only pulses."""
        self._progress.update(self._task, completed=done, total=total)

    def on_fraction(self, fraction: float, step: str) -> None:
        """Say how far the stage is, 0 to 1, and which step of it is running."""
        self.describe(step)
        self.on_progress(fraction, 1.0)


class Stages:
    """Runs stages one after the other, in a `with` block.

    On a terminal each stage has a progress bar on `console`; without one each stage is logged when done.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.records: list[StageRecord] = []
        self._show = console is not None and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not self._show,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Run the body as the stage called `name`; a stage that raises leaves no record."""
        task = self._progress.add_task(name, total=None)
        can_reset = _reset_peak_memory()
        start = time.perf_counter()
        yield Stage(self._progress, task, name)
        seconds = time.perf_counter() - start
        self.records.append(StageRecord(name, seconds, _peak_memory_bytes(can_reset), not can_reset))
        self._progress.update(task, description=name, completed=1, total=1)
        if not self._show:
            peak_mib = self.records[-1].peak_memory_bytes / 2**20
            logger.info("%s: %.1f s, peak memory %.0f MiB", name, seconds, peak_mib)


def _reset_peak_memory() -> bool:
    """Start a new VmHWM of this process (proc(5), clear_refs); False where that is not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory_bytes(was_reset: bool) -> int:
    if was_reset:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

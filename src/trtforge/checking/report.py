"""What a check came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from typing_extensions import Self

from trtforge.checking.comparison import Errors, compare, tolerance
from trtforge.checking.runtimes import candidates, run
from trtforge.checking.schedule import Step, make_steps, num_blocks
from trtforge.errors import ConfigError, EngineBuildError, TrtforgeError
from trtforge.integrity import damaged_files
from trtforge.manifest import Manifest, find_manifest_folder
from trtforge.runtime.executor import Float32Array


@dataclass(frozen=True, slots=True)
class RuntimeReport:
    """One runtime's errors by kind of step; none if it does not take the build, with the reason."""

    runtime: str
    errors: dict[str, Errors] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The errors of all runtimes against the logits of one."""

    manifest: Manifest
    against: str
    tolerance: float
    runtimes: tuple[RuntimeReport, ...]

    @classmethod
    def of(cls, path: Path, against: str, seed: int) -> Self:
        """Check the build in `path`, a repository with one model or a model's folder.

        Raises ConfigError if there is none or if its files are damaged, EngineBuildError if `against`
        computes NaN or infinity, and what `against` and its own runtime raise if they do not take it.
        """
        folder = find_manifest_folder(path)
        manifest = Manifest.load(folder)
        if not manifest.ranks:
            raise ConfigError(f"{folder} has no graph: there is nothing to check")
        if len(manifest.ranks) > 1:
            raise ConfigError(
                f"{folder} has {len(manifest.ranks)} ranks: check compares runtimes by a model that is not "
                "divided; build it once without --tp and --pp"
            )
        damages = list(damaged_files(folder, manifest))
        if damages:
            raise ConfigError(f"{'; '.join(damages)}: build or copy it again")
        cache = manifest.kv_cache.model_copy(update={"num_blocks": num_blocks(manifest.kv_cache.block_size)})
        manifest = manifest.model_copy(update={"kv_cache": cache})
        steps = make_steps(seed, manifest.model.vocab_size, cache.block_size, manifest.limits.max_model_len)
        expected = run(against, folder, manifest, steps)
        if not all(np.isfinite(logits).all() for logits in expected):
            raise EngineBuildError(f"{folder}: {against} computes NaN or infinity, so the weights are wrong")
        reports = []
        for runtime in candidates(manifest):
            if runtime == against:
                continue
            try:
                actual = run(runtime, folder, manifest, steps)
            except TrtforgeError as error:
                if runtime == manifest.runtime:
                    raise
                reports.append(RuntimeReport(runtime, reason=str(error)))
            else:
                reports.append(RuntimeReport(runtime, _errors(actual, expected, steps)))
        allowed = tolerance(manifest.dtype, cache.dtype, len(cache.layers))
        return cls(manifest, against, allowed, tuple(reports))

    @property
    def failed(self) -> tuple[str, ...]:
        """Runtimes that are not within the tolerance."""
        return tuple(
            report.runtime for report in self.runtimes if not all(map(self._passes, report.errors.values()))
        )

    def _passes(self, errors: Errors) -> bool:
        return errors.typical <= self.tolerance

    def tables(self) -> Group:
        """The errors, for a terminal."""
        manifest = self.manifest
        parts: list[RenderableType] = [self._table(report) for report in self.runtimes if report.errors]
        parts.append(
            "rel: the largest error of a row by the row's range, in all rows but the worst tenth. Tolerance "
            f"of {manifest.dtype} over {len(manifest.kv_cache.layers)} layers: {self.tolerance:.2g}."
        )
        parts += [
            f"Not run by {report.runtime}: {report.reason}" for report in self.runtimes if report.reason
        ]
        return Group(*parts)

    def _table(self, report: RuntimeReport) -> Table:
        title = (
            f"{self.manifest.model.name} in {self.manifest.dtype}: {report.runtime} against {self.against}"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("logits of")
        for column in ("rows", "max abs", "rel", "worst rel", "KL, nats", "top-1"):
            table.add_column(column, justify="right")
        table.add_column("")
        for kind, errors in report.errors.items():
            numbers = (errors.max_abs, errors.typical, errors.worst, errors.max_kl)
            texts = [f"{number:.2g}" for number in numbers]
            verdict = "pass" if self._passes(errors) else "FAIL"
            table.add_row(kind, f"{errors.num_rows:,}", *texts, f"{errors.top1:.1%}", verdict)
        return table


def _errors(
    actual: Sequence[Float32Array], expected: Sequence[Float32Array], steps: Sequence[Step]
) -> dict[str, Errors]:
    """By kind of step, in order."""
    pairs: dict[str, list[tuple[Float32Array, Float32Array]]] = {}
    for step, rows, wanted in zip(steps, actual, expected, strict=True):
        pairs.setdefault(step.kind, []).append((rows, wanted))
    return {
        kind: compare(
            np.concatenate([rows for rows, _ in of_kind]), np.concatenate([wanted for _, wanted in of_kind])
        )
        for kind, of_kind in pairs.items()
    }

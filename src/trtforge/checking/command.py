"""The command `trtforge check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trtforge.checking.runtime_names import OfAnyBuild
from trtforge.errors import EngineBuildError


def check(
    path: Annotated[
        Path, typer.Argument(metavar="REPO", help="A repository with one model, or a model's folder.")
    ],
    against: Annotated[
        OfAnyBuild,
        typer.Option(help="What the others are compared with; onnxruntime computes in float32."),
    ] = "onnxruntime",
    seed: Annotated[int, typer.Option(help="Draws the tokens and the blocks of the cache.")] = 0,
) -> None:
    """Compare what every runtime that takes the build computes with ONNX Runtime in float32.

    First, the build's files are compared with their hashes: what is wrong in them is wrong for all.

    Then all get the same packed steps of random tokens: prefills, chunks and decodes.

    \b
    Examples:
      trtforge check repository
      trtforge check repository/llm --against onnxruntime --seed 7

    \b
    Exit codes:
      0  all runtimes agree within the tolerance of the build's dtype
      2  REPO is no build, or its files are damaged
      4  a runtime computes something else, or the graph cannot be run
    """
    with Console(stderr=True).status("checking"):
        # Only now: the runtimes are not imported for a help text.
        from trtforge.checking.report import CheckReport

        report = CheckReport.of(path, against, seed)
    Console(markup=False).print(report.tables(), highlight=False)
    if report.failed:
        raise EngineBuildError(
            f"{path} is not computed right by {', '.join(report.failed)}: rebuild it, and if that does not "
            "help, use another --dtype or --runtime"
        )

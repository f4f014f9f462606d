"""The command `trtforge inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trtforge.errors import ConfigError


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A repository with one model, a model's folder, an ONNX file, or an engine."
        ),
    ],
    layer: Annotated[
        int | None,
        typer.Option(help="With --graph: the decoder layer to draw; 0 by default.", show_default=False),
    ] = None,
    graph_file: Annotated[
        Path | None, typer.Option("--graph", metavar="FILE", help="Draw one layer as FILE.svg or FILE.html.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all facts as JSON.")
    ] = None,
) -> None:
    """Say what is inside a build: its manifest, its graph, its weights, and whether its files are whole.

    \b
    Examples:
      trtforge inspect repository
      trtforge inspect repository/llm --layer 3 --graph layer3.svg
      trtforge inspect model.onnx --json model.json
      trtforge inspect repository/llm/1/rank0/model.engine

    \b
    Exit codes:
      0  complete
      2  a file is missing, cut short or not what the manifest says; or PATH is nothing to inspect
    """
    if layer is not None and graph_file is None:
        raise ConfigError(f"--layer {layer} is drawn into a file: give --graph FILE.svg too")
    if graph_file is not None and graph_file.suffix not in (".svg", ".html"):
        raise ConfigError(f"--graph {graph_file} has to end with .svg or .html")
    with Console(stderr=True).status("reading"):
        # Only now: onnx is not imported for a help text.
        from trtforge.builder.inspection.picture import draw_layer
        from trtforge.builder.inspection.report import InspectionReport, first_graph_file
        from trtforge.builder.inspection.tables import inspection_tables

        report = InspectionReport.of(path)
    # A shape in brackets looks like markup.
    Console(markup=False).print(inspection_tables(report), highlight=False)
    try:
        if json_file is not None:
            report.save(json_file)
        if graph_file is not None:
            draw_layer(first_graph_file(path), layer or 0, graph_file)
    except OSError as error:
        raise ConfigError(f"a file cannot be written: {error}") from None
    if report.findings:
        raise ConfigError(f"{path} is not complete: build or copy it again")

"""The command `trtforge compile-kernels`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from onnxscript import ir
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trtforge.builder.repository import VERSION_FOLDER
from trtforge.errors import ConfigError
from trtforge.manifest import MANIFEST_FILE, Manifest
from trtforge.plugins.aot import write_bundle
from trtforge.plugins.bundle import ARCHS, Bundle
from trtforge.plugins.examples import EXAMPLES
from trtforge.plugins.graph_calls import calls_of, kernels_for
from trtforge.plugins.launch import Call, Kernel

_ALL_ARCHS = ",".join(f"sm_{arch}" for arch in ARCHS)


def compile_kernels(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to put the compiled kernels and their manifest in.")
    ],
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="What build-engine built: a repository, a model's folder in it, or an ONNX file.",
        ),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(help=f"Instead of MODEL, one whose sizes are known: {', '.join(EXAMPLES)}."),
    ] = None,
    arch: Annotated[
        str, typer.Option(metavar="ARCHS", help=f"Some of {_ALL_ARCHS}; all by default.", show_default=False)
    ] = _ALL_ARCHS,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one KV cache block; for an ONNX file, as a repository says it itself.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Kernels that are compiled at once.")
    ] = len(os.sched_getaffinity(0)),
) -> None:
    """Compile the kernels that a model's operators need on NVIDIA GPUs. Needs no GPU.

    OUTPUT appears whole or not at all, and replaces kernels that are there. The same model gives the same
    bytes.

    Kernels for sm_80 run on the compute capabilities 8.0, 8.6 and 8.7, those for sm_89 on 8.9, and those
    for sm_90, sm_100 and sm_120 on exactly 9.0, 10.0 and 12.0.

    \b
    Examples:
      trtforge compile-kernels repository --output kernels
      trtforge compile-kernels model.onnx --block-size 32 --arch sm_90 -o kernels
      trtforge compile-kernels --example llama-8b --arch sm_80,sm_90 -o kernels

    \b
    Exit codes:
      0  compiled
      2  an option or a file cannot work, or the compiler is not installed
      5  the model's operators have no such kernels, or they do not compile
    """
    archs = _parse_archs(arch)
    calls = _calls(model, example, block_size)
    kernels = {arch: kernels_for(calls, arch) for arch in archs}
    if not any(kernels.values()):
        raise ConfigError(f"no operator of {model or example} has kernels: there is nothing to compile")
    bundle = _compile(kernels, output, jobs)
    Console().print(_summary(bundle))
    print(f"compiled {bundle.folder}")


def _parse_archs(text: str) -> tuple[int, ...]:
    names = {f"sm_{arch}": arch for arch in ARCHS}
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"--arch {name!r} is not one of {', '.join(names)}")
    return tuple(names[name] for name in dict.fromkeys(wanted))


def _calls(model: Path | None, example: str | None, block_size: int | None) -> Sequence[tuple[str, Call]]:
    if (model is None) == (example is None):
        raise ConfigError("give either MODEL or --example NAME")
    if block_size is not None and (model is None or model.suffix != ".onnx"):
        raise ConfigError("--block-size goes with an ONNX file: repositories and examples have their own")
    if model is None:
        if example is None or example not in EXAMPLES:
            raise ConfigError(f"--example {example!r} is not one of {', '.join(EXAMPLES)}")
        return EXAMPLES[example]
    if model.suffix == ".onnx":
        sizes = {} if block_size is None else {"block_size": block_size}
        return calls_of(_load(model), sizes)
    folder = _manifest_folder(model)
    manifest = Manifest.load(folder)
    sizes = {"block_size": manifest.kv_cache.block_size}
    return [call for rank in manifest.ranks for call in calls_of(_load(folder / rank.onnx), sizes)]


def _manifest_folder(folder: Path) -> Path:
    """Where the manifest of the one model in `folder` is; raises ConfigError if there is not one."""
    for candidate in (folder, folder / VERSION_FOLDER):
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    models = sorted(path.parent for path in folder.glob(f"*/{VERSION_FOLDER}/{MANIFEST_FILE}"))
    if len(models) == 1:
        return models[0]
    if models:
        names = ", ".join(str(model.parent) for model in models)
        raise ConfigError(f"{folder} holds several models, give one of them: {names}")
    raise ConfigError(f"{folder} holds no model that build-engine built, and is no .onnx file")


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None


def _compile(kernels: Mapping[int, Sequence[Kernel]], output: Path, jobs: int) -> Bundle:
    total = sum(map(len, kernels.values()))
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    if not console.is_terminal:
        console.print(f"compiling {total} kernels")
    with progress:
        task = progress.add_task("compile kernels", total=total)
        return write_bundle(kernels, output, num_processes=jobs, on_compiled=lambda _: progress.advance(task))


def _summary(bundle: Bundle) -> Table:
    table = Table()
    table.add_column("arch")
    for name in ("kernels", "KiB", "largest shared memory, KiB"):
        table.add_column(name, justify="right")
    for arch in sorted({entry.arch for entry in bundle.manifest.cubins}):
        entries = [entry for entry in bundle.manifest.cubins if entry.arch == arch]
        size, shared = sum(e.num_bytes for e in entries), max(e.shared_bytes for e in entries)
        table.add_row(f"sm_{arch}", str(len(entries)), f"{size / 1024:,.0f}", f"{shared / 1024:.1f}")
    return table

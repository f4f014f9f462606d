"""The commands `trtforge` and `build-engine`: where the folders meet, each imported when it is used."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from trtforge import __version__
from trtforge.client.bench.command import bench
from trtforge.client.commands import ask, health, serve
from trtforge.errors import TrtforgeError

_ERRORS = {error.exit_code: (error.__doc__ or "").splitlines()[0] for error in TrtforgeError.__subclasses__()}
EXIT_CODES = "\n".join(
    [
        "\b",  # keep the lines as they are
        "Exit codes:",
        "  0  Success.",
        "  1  A bug in trtforge.",
        *(f"  {code}  {meaning}" for code, meaning in sorted(_ERRORS.items())),
        "130  Interrupted by Ctrl-C.",
        "TRTFORGE_DEBUG=1 in the environment shows where an error comes from.",
    ]
)
_SETTINGS: dict[str, Any] = {
    "context_settings": {"help_option_names": ["-h", "--help"]},
    # Python's own traceback: the pretty one prints local variables, prompts among them.
    "pretty_exceptions_enable": False,
}

app = typer.Typer(name="trtforge", no_args_is_help=True, epilog=EXIT_CODES, **_SETTINGS)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trtforge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Compile Hugging Face LLMs and serve them from a stock Triton Inference Server."""


# Options that only the command itself knows, whose imports take longer than a help text may.
_DEFERRED: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
}


@app.command(**_DEFERRED)
def build(context: typer.Context) -> None:
    """Build a Hugging Face model into a model repository; the same command as build-engine."""
    _builder()(args=context.args, prog_name="trtforge build")


@app.command(**_DEFERRED)
def plan(context: typer.Context) -> None:
    """Say what a model needs of which GPUs, and how fast it can be, before anything is built."""
    from trtforge.builder.planning.command import plan as command

    _only(command)(args=context.args, prog_name="trtforge plan")


@app.command(**_DEFERRED)
def compile_kernels(context: typer.Context) -> None:
    """Compile the kernels that a built model's operators need on NVIDIA GPUs."""
    from trtforge.builder.kernels_command import compile_kernels as command

    _only(command)(args=context.args, prog_name="trtforge compile-kernels")


@app.command(**_DEFERRED)
def inspect(context: typer.Context) -> None:
    """Say what is inside a build, whether its files are whole, and draw a layer of its graph."""
    from trtforge.builder.inspection.command import inspect as command

    _only(command)(args=context.args, prog_name="trtforge inspect")


@app.command(**_DEFERRED)
def check(context: typer.Context) -> None:
    """Run a build through every runtime that can, and compare their logits with ONNX Runtime's."""
    from trtforge.checking.command import check as command

    _only(command)(args=context.args, prog_name="trtforge check")


@app.command(**_DEFERRED)
def evaluate(context: typer.Context) -> None:
    """Score a text by a build: perplexity, and how far its logits are from the unquantized model's."""
    from trtforge.evaluation.command import evaluate as command

    _only(command)(args=context.args, prog_name="trtforge evaluate")


app.command()(serve)
app.command()(health)
app.command()(ask)
app.command()(bench)


def _builder() -> typer.Typer:
    from trtforge.builder.command import build as command

    return _only(command)


def _only(command: Callable[..., None]) -> typer.Typer:
    """An application whose one command it is."""
    application = typer.Typer(add_completion=False, **_SETTINGS)
    application.command()(command)
    return application


def main() -> NoReturn:
    """`trtforge`: ends the process with the exit code of the command."""
    _run(app, "trtforge")


def build_engine() -> NoReturn:
    """`build-engine`: ends the process with the exit code of the build."""
    _run(_builder(), "build-engine")


def _run(command: typer.Typer, name: str) -> NoReturn:
    try:
        command(prog_name=name)
    except TrtforgeError as error:
        if os.environ.get("TRTFORGE_DEBUG"):
            traceback.print_exc()
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)

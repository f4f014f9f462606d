"""The command `trtforge evaluate`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_DEFAULT_WINDOW = 1024


def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="REPO", help="A repository with one model, or a model's folder.")
    ],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The text that is scored, in UTF-8.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL_OR_REPO",
            help="What the logits are compared with: another build, or the Hugging Face model before it was "
            "quantized, which is built for the same runtime in a temporary folder.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"Tokens of one sequence; {_DEFAULT_WINDOW}, or what the build can if that is less, by "
            "default.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens from the start of a window to that of the next; by default no token is read twice. "
            "A shorter stride gives tokens more context and takes longer.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything to this file.", show_default=False),
    ] = None,
    svg_file: Annotated[
        Path | None,
        typer.Option(
            "--svg",
            metavar="FILE",
            help="Draw the figures of each window into this file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a build costs in quality: perplexity of a text, and how far its logits are from another's.

    The executor that serves the build scores the text, window by window: each token is predicted from those
    before it in its window. With --against, both models read the same tokens.

    \b
    Examples:
      trtforge evaluate repository --text book.txt
      trtforge evaluate repository-int4 --text book.txt --against ./model --svg quality.svg
      trtforge evaluate repository-int4 --text book.txt --against repository --window 2048 --stride 512

    \b
    Exit codes:
      0  scored
      2  a build, the text or an option cannot work, or the two models have different tokens
      3  MODEL cannot be exported
      4  MODEL cannot be built, or a model computes NaN
      6  no room for what is built or loaded
    """
    console = Console(stderr=True)
    # Only now: the runtimes are not imported for a help text.
    from trtforge.evaluation.evaluate import evaluate as run
    from trtforge.evaluation.model import load_model
    from trtforge.evaluation.reference import check_same_tokens, find_reference
    from trtforge.evaluation.windows import cut, read_text, tokenize
    from trtforge.manifest import Manifest, find_manifest_folder

    folder = find_manifest_folder(path)
    manifest = Manifest.load(folder)
    window = window or min(_DEFAULT_WINDOW, manifest.limits.max_model_len)
    content = read_text(text)
    tokens = tokenize(content, folder / manifest.tokenizer)
    stride = stride or window - len(tokens.prefix)
    cut(tokens, window, stride)  # what cannot work is said before anything is built or loaded
    with ExitStack() as stack:
        reference = None
        if against is not None:

            def check_tokenizer(tokenizer: Path) -> None:
                check_same_tokens(tokens, content, tokenizer)

            other = stack.enter_context(find_reference(against, manifest, window, check_tokenizer, console))
            reference = stack.enter_context(load_model(other, window, name=against))
        with console.status("loading"):
            model = stack.enter_context(load_model(folder, window, name=str(path)))
        progress = stack.enter_context(_progress(console))
        task = progress.add_task("scoring", total=len(tokens.tokens))
        result = run(
            model,
            reference,
            tokens,
            window,
            stride,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    if json_file is not None:
        result.save(json_file)
    if svg_file is not None:
        result.draw(svg_file)
    Console(markup=False).print(result.table(), highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

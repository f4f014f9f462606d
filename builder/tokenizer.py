"""The tokenizer's files in the form that serving reads: tokenizer.json, its config, a chat template."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trtforge.errors import EngineBuildError


def write_tokenizer(source: Path, folder: Path) -> None:
    """Convert the tokenizer of the checkpoint in `source`, a folder or a GGUF file, into `folder`.

    Raises EngineBuildError if there is none, or only one that is Python code instead of a tokenizer.json.
    """
    try:
        tokenizer = _load(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EngineBuildError(f"the tokenizer of {source} cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise EngineBuildError(
            f"{type(tokenizer).__name__} of {source} has no fast form (tokenizer.json), which serving needs: "
            "convert it with transformers, or take a checkpoint that has the file"
        )
    tokenizer.save_pretrained(folder)


def _load(source: Path) -> Any:
    if not source.is_file():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    with alone(source) as folder:
        return AutoTokenizer.from_pretrained(folder, gguf_file=source.name)


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """A folder with nothing but a link to `file`: transformers looks at what else is beside it."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, file.name).symlink_to(file.resolve())
        yield Path(scratch)

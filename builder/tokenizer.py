"""The tokenizer's files in the form that serving reads: tokenizer.json, its config, a chat template."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from trtforge.errors import EngineBuildError


def write_tokenizer(source: Path, folder: Path) -> None:
    """Convert the tokenizer of the checkpoint in `source` into `folder`.

    Raises EngineBuildError if there is none, or only one that is Python code instead of a tokenizer.json.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EngineBuildError(f"the tokenizer of {source} cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise EngineBuildError(
            f"{type(tokenizer).__name__} of {source} has no fast form (tokenizer.json), which serving needs: "
            "convert it with transformers, or take a checkpoint that has the file"
        )
    tokenizer.save_pretrained(folder)

"""A text as tokens, cut into the windows in which it is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtforge.errors import ConfigError
from trtforge.runtime.executor import Int32Array
from trtforge.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Text:
    """The tokens of a text, and those that the tokenizer puts in front of a prompt."""

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """One sequence. Its tokens from `first_scored` on are predicted, each from all before it."""

    tokens: Int32Array  # [prefix + text]
    first_scored: int  # at least 1
    end: int  # in the text: how many of its tokens are scored or skipped after this window


def read_text(file: Path) -> str:
    """The text in `file`. Raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {file} cannot be read: {error}") from None


def tokenize(text: str, folder: Path) -> Text:
    """`text` by the tokenizer in `folder`."""
    tokenizer = Tokenizer(folder)
    plain, prompt = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    starts = range(len(prompt) - len(plain) + 1)
    start = next((start for start in starts if prompt[start : start + len(plain)] == plain), 0)
    return Text(prompt[:start], plain)


def cut(text: Text, window: int, stride: int) -> list[Window]:
    """Windows of at most `window` tokens, the prefix included, whose text begins every `stride` tokens.

    A token is scored in the first window that has it. The first of the text, which nothing predicts without
    a prefix, is not. Raises ConfigError if a window has no room for a stride, and if the text fills none.
    """
    room = window - len(text.prefix)
    if not 1 <= stride <= room:
        raise ConfigError(
            f"--stride {stride} is not allowed: it is 1 to {room}, the tokens of the text in a window"
        )
    if len(text.tokens) < room:
        raise ConfigError(
            f"the text has {len(text.tokens):,} tokens, which fill no window of {window:,}: give a longer "
            "text, or a shorter --window"
        )
    return list(_windows(text.prefix, text.tokens, room, stride))


def _windows(prefix: Sequence[int], tokens: Sequence[int], room: int, stride: int) -> Iterator[Window]:
    end = 0
    for begin in range(0, len(tokens), stride):
        scored_from, end = end, min(begin + room, len(tokens))
        # Nothing stands before the first token of a window that has no prefix.
        first = max(len(prefix) + max(scored_from, begin) - begin, 1)
        if first < len(prefix) + end - begin:
            yield Window(np.array([*prefix, *tokens[begin:end]], np.int32), first, end)
        if end == len(tokens):
            return

"""Token ids to text while they arrive: no half characters, and stop strings found and cut off."""

from __future__ import annotations

from collections.abc import Sequence

from trtforge.runtime.text.text_stream import TextStream


class Detokenizer:
    """The text of one answer, cut before the stop string whose end comes first.

    The text of the first `min_tokens` tokens is never part of a stop string.
    """

    __slots__ = (
        "_first_chars",
        "_held",
        "_min_tokens",
        "_push",
        "_stops",
        "_stream",
        "num_tokens",
        "stopped",
    )

    def __init__(self, stream: TextStream, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._stream = stream
        self._push = stream.push
        self._stops = [_StopString(text) for text in stop]
        self._first_chars = frozenset(text[0] for text in stop)
        self._min_tokens = min_tokens
        self._held = ""  # may be the beginning of a stop string
        self.num_tokens = 0  # up to the one that completed a stop string
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Text to hand out after these tokens; what comes after a stop string is not looked at."""
        if not self._stops:
            self.num_tokens += len(token_ids)
            return self._push(token_ids[0]) if len(token_ids) == 1 else "".join(map(self._push, token_ids))
        text = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            piece = self._push(token_id)
            text += self._scan(piece) if self.num_tokens > self._min_tokens else piece
        return text

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._stream.flush()
        if not self._stops or self.num_tokens <= self._min_tokens:
            return text
        text = self._scan(text)
        return text if self.stopped else text + self._held

    def _scan(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._held and self._first_chars.isdisjoint(text):
            return text  # the usual case, without a look at each character
        candidate = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            found = max(stop.length if stop.advance(char) else 0 for stop in self._stops)
            if found:
                self.stopped = True
                return candidate[: end - found]
        safe = len(candidate) - max(stop.matched for stop in self._stops)
        self._held = candidate[safe:]
        return candidate[:safe]


class _StopString:
    """Knuth-Morris-Pratt matching: how much of the string the text ends with, `matched` characters."""

    def __init__(self, text: str) -> None:
        self.length = len(text)
        self.matched = 0
        self._text = text
        self._border = [0] * len(text)  # [i]: longest proper border of text[:i + 1]
        for i in range(1, len(text)):
            self._border[i] = self._extend(self._border[i - 1], text[i])

    def advance(self, char: str) -> bool:
        """Take the text's next character; True if the whole string ends there. Not called after that."""
        self.matched = self._extend(self.matched, char)
        return self.matched == self.length

    def _extend(self, matched: int, char: str) -> int:
        while matched and self._text[matched] != char:
            matched = self._border[matched - 1]
        return matched + (self._text[matched] == char)

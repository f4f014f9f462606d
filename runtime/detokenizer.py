"""Token ids to text while they arrive: no half characters, and stop strings found and cut off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trtforge.runtime.text_stream import TextStream


class Detokenizer:
    """The text of one request, cut before the stop string whose end comes first."""

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()) -> None:
        self._stream = stream
        self._stops = [_StopString(text) for text in stop]
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token_ids: Iterable[int]) -> str:
        """Text to hand out after these tokens; the empty string once a stop string was found."""
        return "".join(self._scan(self._stream.push(token_id)) for token_id in token_ids)

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._scan(self._stream.flush())
        return text if self.stopped else text + self._held

    def _scan(self, text: str) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else text
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

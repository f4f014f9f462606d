"""What tokens stand for, and how the text of a growing sequence is decoded token by token.

A `Vocabulary` belongs to a tokenizer, a `TextStream` to one sequence. A token costs the same wherever it
stands.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from typing import Any, Protocol

import tokenizers

from trtforge.errors import ConfigError

REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Decodes one sequence. All texts together are what the tokenizer decodes from all ids at once,
    special tokens left out."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; what later tokens can still change is held back."""
        ...

    def flush(self) -> str:
        """The rest, at the end of the sequence."""
        ...


class Vocabulary(Protocol):
    """What the tokens of one tokenizer stand for."""

    def stream(self) -> TextStream:
        """A decoder for a new sequence."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for within a sequence; nothing for special and unknown ones."""
        ...


def load_vocabulary(tokenizer: tokenizers.Tokenizer) -> Vocabulary:
    """The vocabulary of any tokenizer whose decoder treats tokens one by one or as UTF-8 bytes.

    Raises ConfigError for a decoder that cannot be streamed.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"]
    steps = _flatten(decoder)
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return _ByteLevelVocabulary(tokenizer)
    after_fuse = steps[names.index("Fuse") + 1 :] if "Fuse" in names else []
    strip = after_fuse[0] if after_fuse and after_fuse[0]["type"] == "Strip" else None
    streamable = set(names) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
    if strip:
        # The text is stripped as a whole: that can be followed only if no token's own text depends on
        # where it stands.
        streamable &= strip["stop"] == 0 and not {"Metaspace", "WordPiece"} & set(names)
    if not streamable or len(after_fuse) > (strip is not None):
        raise ConfigError(f"the tokenizer's decoder {' + '.join(names)} cannot be decoded incrementally")
    return _PieceVocabulary(
        tokenizer,
        has_byte_tokens="ByteFallback" in names,
        strip=(strip["content"], strip["start"]) if strip else ("", 0),
    )


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]


class _Tokens:
    """Token strings by id; None for ids that decode to nothing: special and unknown ones."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}

    def token(self, token_id: int) -> str | None:
        return None if token_id in self._special else self._tokenizer.id_to_token(token_id)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where it is printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class _ByteLevelVocabulary:
    """Every token stands for some bytes, which together are decoded as UTF-8."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokens = _Tokens(tokenizer)
        self._alphabet = _byte_level_alphabet()
        self._bytes: dict[int, bytes] = {}
        # Text of tokens that are whole characters, which most are: they need no decoder.
        self.texts: dict[int, str] = {}

    def token_bytes(self, token_id: int) -> bytes:
        value = self._bytes.get(token_id)
        if value is None:
            value = self._bytes[token_id] = self._to_bytes(self._tokens.token(token_id) or "")
            with contextlib.suppress(UnicodeDecodeError):
                self.texts[token_id] = value.decode()
        return value

    def _to_bytes(self, token: str) -> bytes:
        if all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        return token.encode()  # an added token, written as it is

    def stream(self) -> TextStream:
        return _ByteLevelStream(self)


class _ByteLevelStream:
    def __init__(self, vocabulary: _ByteLevelVocabulary) -> None:
        self._vocabulary = vocabulary
        # Holds back at most three bytes: an invalid sequence becomes U+FFFD as soon as it is one.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._texts = vocabulary.texts
        self._is_inside_char = False

    def push(self, token_id: int) -> str:
        if not self._is_inside_char and token_id in self._texts:
            return self._texts[token_id]
        text = self._utf8.decode(self._vocabulary.token_bytes(token_id))
        self._is_inside_char = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceVocabulary:
    """Every token has a text of its own, which may be another one at the start of the sequence.

    Byte tokens (`<0xE2>`) are decoded a run at a time: as UTF-8 if the whole run is valid, else every
    byte becomes U+FFFD.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, has_byte_tokens: bool, strip: tuple[str, int]
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = _Tokens(tokenizer)
        self._has_byte_tokens = has_byte_tokens
        self.strip = strip
        # The tokenizer is asked for a token's text behind this one, to see it as it is in mid-sequence.
        self._anchor = next(
            token_id
            for token, token_id in sorted(tokenizer.get_vocab().items())
            if token.isalpha() and self._tokens.token(token_id) is not None
        )
        self._anchor_length = len(self._decode([self._anchor]))
        self._texts: dict[int, str] = {}

    def is_skipped(self, token_id: int) -> bool:
        return self._tokens.token(token_id) is None

    def byte(self, token_id: int) -> bytes | None:
        token = self._tokens.token(token_id) if self._has_byte_tokens else None
        if token is None or len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
            return None
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None

    def token_bytes(self, token_id: int) -> bytes:
        if self.is_skipped(token_id):
            return b""
        return self.byte(token_id) or self.text([token_id], first=False).encode()

    def text(self, token_ids: list[int], *, first: bool) -> str:
        """The text of one token or of one run of byte tokens; not stripped."""
        if first and not self.strip[1]:
            return self._decode(token_ids)
        if len(token_ids) > 1:
            return self._decode([self._anchor, *token_ids])[self._anchor_length :]
        (token_id,) = token_ids
        value = self._texts.get(token_id)
        if value is None:
            value = self._decode([self._anchor, token_id])[self._anchor_length :]
            self._texts[token_id] = value
        return value

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def stream(self) -> TextStream:
        return _PieceStream(self)


class _PieceStream:
    def __init__(self, vocabulary: _PieceVocabulary) -> None:
        self._vocabulary = vocabulary
        self._first = True
        self._strip, self._num_to_strip = vocabulary.strip
        self._run: list[int] = []  # byte tokens held back: valid so far, and the run goes on
        self._run_is_invalid = False
        self._new_run()

    def push(self, token_id: int) -> str:
        if self._vocabulary.is_skipped(token_id):
            return ""
        byte = self._vocabulary.byte(token_id)
        if byte is not None:
            return self._push_byte(token_id, byte)
        before = self.flush() if self._run or self._run_is_invalid else ""
        return before + self._take([token_id])

    def flush(self) -> str:
        if self._run and self._utf8.getstate()[0]:
            text = self._take_invalid()
        else:
            text = self._take(self._run) if self._run else ""
        self._new_run()
        return text

    def _new_run(self) -> None:
        self._run = []
        self._run_is_invalid = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def _push_byte(self, token_id: int, byte: bytes) -> str:
        self._run.append(token_id)
        if not self._run_is_invalid:
            try:
                self._utf8.decode(byte)
            except UnicodeDecodeError:
                self._run_is_invalid = True
        return self._take_invalid() if self._run_is_invalid else ""

    def _take_invalid(self) -> str:
        text = REPLACEMENT * len(self._run)
        self._run = []
        return self._leave_start(text)

    def _take(self, token_ids: list[int]) -> str:
        return self._leave_start(self._vocabulary.text(token_ids, first=self._first))

    def _leave_start(self, text: str) -> str:
        self._first = False
        while text and self._num_to_strip:
            if not text.startswith(self._strip):
                self._num_to_strip = 0
                break
            text = text[len(self._strip) :]
            self._num_to_strip -= 1
        return text

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from trtforge.errors import ConfigError
from trtforge.runtime.text.detokenizer import Detokenizer
from trtforge.runtime.text.text_stream import TextStream, load_vocabulary

# What breaks decoders: spaces and their stand-ins, whole and split characters, look-alikes of byte tokens.
PIECES = [
    *("a", "b", "ab", "do", "not", "Paris", ".", ",", "'t", "##ing", "##"),
    *("é", "\u20ac", "\U0001f389", "\ufffd", "\u2581", "\u2581\u2581", "\u2581Paris", "A\u2581b"),
    *(" ", " x", "\n", "<0xZZ>", "<0x0>", "<s>", "</s>", "<unk>"),
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def word_level(decoder: decoders.Decoder | None, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("an added token", normalized=False)])
    return tokenizer


def sentencepiece_like(*steps: decoders.Decoder) -> tokenizers.Tokenizer:
    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), *steps])
    return word_level(decoder, BYTE_TOKENS + PIECES)


TOKENIZERS = {
    "llama 2": sentencepiece_like(decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    "two spaces stripped": sentencepiece_like(decoders.Fuse(), decoders.Strip(" ", 2, 0)),
    "gemma": sentencepiece_like(decoders.Fuse()),
    "byte fallback, then metaspace": word_level(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), BYTE_TOKENS + PIECES
    ),
    "metaspace": word_level(decoders.Metaspace(), PIECES),
    "metaspace, never prepended": word_level(decoders.Metaspace(prepend_scheme="never"), PIECES),
    "word piece": word_level(decoders.WordPiece(), PIECES),
    "no decoder": word_level(None, PIECES),
    "byte level": word_level(
        decoders.ByteLevel(),
        [*BYTE_ALPHABET, *PIECES[:4], "âĤ¬", "ðŁİ", "<s>", "</s>"],
    ),
}


def text_stream(tokenizer: tokenizers.Tokenizer) -> TextStream:
    return load_vocabulary(tokenizer).stream()


def check_streaming(tokenizer: tokenizers.Tokenizer, tokens: Sequence[int]) -> None:
    detokenizer = Detokenizer(text_stream(tokenizer))
    deltas = [detokenizer.push([token_id]) for token_id in tokens]
    text = "".join(deltas) + detokenizer.finish()
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def ids_of(tokenizer: tokenizers.Tokenizer, tokens: Iterable[str]) -> list[int]:
    vocab = tokenizer.get_vocab()
    return [vocab[token] for token in tokens]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return TOKENIZERS[request.param]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_deltas_together_are_what_the_tokenizer_decodes(
    tokenizer: tokenizers.Tokenizer, data: st.DataObject
) -> None:
    known = tokenizer.get_vocab_size()
    byte_runs = st.integers(0, min(255, known - 1))  # byte tokens where there are any
    anything = st.integers(0, known + 3)  # some ids that no token has: the model's vocabulary is padded
    check_streaming(tokenizer, data.draw(st.lists(st.one_of(byte_runs, anything), max_size=24)))


def bytes_of(text: str) -> str:
    """Its UTF-8 bytes as the byte-level alphabet writes them, one character each."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=12), garbage=st.text(BYTE_ALPHABET, max_size=6), at=st.integers(0, 40))
def test_any_bytes_of_byte_level_tokens(text: str, garbage: str, at: int) -> None:
    encoded = bytes_of(text)
    tokenizer = TOKENIZERS["byte level"]
    check_streaming(tokenizer, ids_of(tokenizer, encoded[:at] + garbage + encoded[at:]))


@settings(max_examples=150, deadline=None)
@given(
    runs=st.lists(st.tuples(st.text(max_size=6), st.binary(max_size=2), st.sampled_from(PIECES)), max_size=4)
)
def test_any_bytes_of_byte_fallback(runs: list[tuple[str, bytes, str]]) -> None:
    tokens = []
    for text, garbage, piece in runs:
        tokens += [BYTE_TOKENS[byte] for byte in text.encode() + garbage] + [piece]
    tokenizer = TOKENIZERS["llama 2"]
    check_streaming(tokenizer, ids_of(tokenizer, tokens))


def test_no_half_characters(tiny_tokenizer: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    text = "naïve 早上好 🎉 \u200d👩\u200d🚀"
    detokenizer = Detokenizer(text_stream(tokenizer))
    deltas = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text).ids]
    assert not any("\ufffd" in delta for delta in deltas)
    assert "".join(deltas) == text
    assert detokenizer.finish() == ""


def test_invalid_bytes_are_given_up_at_once() -> None:
    tokenizer = TOKENIZERS["byte level"]
    continuation = ids_of(tokenizer, bytes_of("é")[1])
    detokenizer = Detokenizer(text_stream(tokenizer))
    assert [detokenizer.push(continuation) for _ in range(3)] == ["\ufffd"] * 3


def test_bytes_are_held_only_while_they_can_be_a_character() -> None:
    tokenizer = TOKENIZERS["llama 2"]
    detokenizer = Detokenizer(text_stream(tokenizer))
    assert [detokenizer.push([byte]) for byte in b"\xe2\x82"] == ["", ""]
    assert detokenizer.push([0xFF]) == "\ufffd" * 3
    assert detokenizer.push([0x41]) == "\ufffd"  # the run stays invalid as a whole
    assert detokenizer.push(ids_of(tokenizer, ["a"])) == "a"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_decoders_that_look_ahead_are_refused(decoder: decoders.Decoder) -> None:
    with pytest.raises(ConfigError, match="cannot be decoded incrementally"):
        load_vocabulary(word_level(decoder, PIECES))


# --------------------------------------------------------------------------- stop strings


class Characters:
    """Token ids are code points."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


def first_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop string that is complete first, the longest if several are; None: no stop."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
    data=st.data(),
)
def test_stop_strings_like_a_search_of_the_whole_text(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    detokenizer = Detokenizer(Characters(), stops)
    out, given_text = "", ""
    while given_text != text and not detokenizer.stopped:
        size = data.draw(st.integers(1, 6))
        chunk = text[len(given_text) : len(given_text) + size]
        given_text += chunk
        out += detokenizer.push([ord(char) for char in chunk])
        if not detokenizer.stopped:
            # Nothing is held back that cannot become a stop string, and no more than that.
            held = given_text[len(out) :]
            beginnings = [s[:n] for s in stops for n in range(len(s)) if given_text.endswith(s[:n])]
            assert held == max(beginnings, key=len, default="")
    expected = first_stop(text, stops)
    assert detokenizer.stopped == (expected is not None)
    assert out + detokenizer.finish() == (text if expected is None else expected)


def test_stop_string_across_tokens_and_in_held_bytes() -> None:
    tokenizer = TOKENIZERS["llama 2"]
    detokenizer = Detokenizer(text_stream(tokenizer), ["b\u20ac"])
    assert detokenizer.push([*ids_of(tokenizer, ["ab"]), *"\u20ac".encode()]) == "a"
    assert not detokenizer.stopped
    # Only the end of the sequence ends the run of bytes.
    assert detokenizer.finish() == ""
    assert detokenizer.stopped

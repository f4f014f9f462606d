"""Guided decoding: what an answer has to look like as a grammar that knows which tokens may come next.

The library, xgrammar, imports torch: it is loaded with the first guided request.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tokenizers

from trtforge.errors import RequestError
from trtforge.runtime.executor import Float32Array
from trtforge.runtime.request import GuidedDecoding
from trtforge.runtime.sampling.json_schema import check_json_schema, without_control_characters
from trtforge.runtime.sampling.processor import History, LogitsProcessor
from trtforge.runtime.text.text_stream import load_vocabulary

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

logger = logging.getLogger(__name__)

MAX_GUIDE_CHARS = 64 * 1024
_CACHE_BYTES = 256 * 2**20
_MAX_REASON_CHARS = 300


class GrammarCompiler:
    """Compiles guides for one tokenizer. Safe to use from several threads.

    Compiled grammars are kept for the next request with the same guide, the least recently used ones are
    dropped beyond 256 MiB.
    """

    def __init__(self, tokenizer_folder: Path, vocab_size: int, stop_token_ids: Collection[int]) -> None:
        """`vocab_size` is the model's, which may be larger than the tokenizer's; `stop_token_ids` may come
        where a grammar can end. Reads nothing yet."""
        self._tokenizer_folder = tokenizer_folder
        self._vocab_size = vocab_size
        self._stop_token_ids = sorted(stop_token_ids)
        self._lock = threading.Lock()
        self._compiler: Any = None

    def compile(self, guided: GuidedDecoding) -> CompiledGrammar:
        """The grammar of a guide. Takes seconds the first time, and milliseconds for most guides later.

        Raises RequestError for a guide that is too large, not valid, not supported, or has no answer.
        """
        check_guide(guided)
        compiler = self._load()
        try:
            grammar = _compile(compiler, guided)
        except RuntimeError as error:
            raise RequestError(f"guided {guided.kind}: {_reason(error)}") from None
        compiled = CompiledGrammar(grammar, self._vocab_size)
        if not compiled.matcher().allowed().any():
            raise RequestError(f"guided {guided.kind}: no answer can look like this")
        return compiled

    def _load(self) -> Any:
        with self._lock:
            if self._compiler is None:
                import xgrammar

                tokenizer = xgrammar.TokenizerInfo(
                    self._token_bytes(),
                    xgrammar.VocabType.RAW,
                    vocab_size=self._vocab_size,
                    stop_token_ids=self._stop_token_ids,
                )
                self._compiler = xgrammar.GrammarCompiler(
                    tokenizer, max_threads=1, cache_limit_bytes=_CACHE_BYTES
                )
            return self._compiler

    def _token_bytes(self) -> list[bytes]:
        """What every token of the model stands for; nothing for special and padding tokens, which are
        thereby never allowed."""
        path = self._tokenizer_folder / "tokenizer.json"
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        vocabulary = load_vocabulary(tokenizer)
        return [vocabulary.token_bytes(token_id) for token_id in range(self._vocab_size)]


class CompiledGrammar:
    """A grammar, for any number of sequences."""

    def __init__(self, grammar: Any, vocab_size: int) -> None:
        """`grammar` is an xgrammar.CompiledGrammar."""
        self._grammar = grammar
        self._vocab_size = vocab_size

    def matcher(self) -> GrammarMatcher:
        """A matcher at the start of an answer."""
        import xgrammar

        return GrammarMatcher(xgrammar.GrammarMatcher(self._grammar), self._vocab_size)


class GrammarMatcher:
    """Where in its grammar one answer is. Not thread-safe."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        """`matcher` is an xgrammar.GrammarMatcher."""
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_terminated(self) -> bool:
        """Whether a stop token has ended the grammar: nothing can follow."""
        return bool(self._matcher.is_terminated())

    def accept(self, token_ids: Sequence[int]) -> int:
        """Advance by tokens up to the first one that the grammar refuses; returns how many it took."""
        for num_accepted, token_id in enumerate(token_ids):
            if self.is_terminated or not self._matcher.accept_token(token_id):
                return num_accepted
        return len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        """Go back by some of the accepted tokens."""
        if num_tokens:
            self._matcher.rollback(num_tokens)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[vocab_size]: the tokens that may come next; after the end of the grammar none."""
        if self.is_terminated:
            return np.zeros(self._vocab_size, bool)
        bits = np.empty((1, -(-self._vocab_size // 32)), np.int32)
        self._matcher.fill_next_token_bitmask(bits)
        unpacked = np.unpackbits(bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        return unpacked.view(bool)

    def fork(self) -> GrammarMatcher:
        """Another matcher at the same place."""
        return GrammarMatcher(self._matcher.fork(), self._vocab_size)


class GrammarMask(LogitsProcessor):
    """Forbids what the grammar does not allow next."""

    def __init__(self, matcher: GrammarMatcher) -> None:
        self._matcher = matcher
        self._is_lost = False

    def apply(self, logits: Float32Array, history: History) -> None:
        """Forbids everything where the grammar has ended, and behind a draft that it refuses."""
        drafts = history.drafts
        num_accepted = self._matcher.accept(drafts)
        try:
            if self._is_lost or num_accepted < len(drafts):
                logits.fill(-np.inf)
            else:
                np.copyto(logits, -np.inf, where=~self._matcher.allowed())
        finally:
            self._matcher.rollback(num_accepted)

    def accept(self, token_ids: Sequence[int]) -> None:
        if self._matcher.accept(token_ids) < len(token_ids):
            # It was allowed when it was sampled. Nothing right can follow, so the answer ends.
            logger.warning("a grammar refuses a token that it had allowed; its answer ends")
            self._is_lost = True

    def fork(self) -> GrammarMask:
        return GrammarMask(self._matcher.fork())


def _compile(compiler: Any, guided: GuidedDecoding) -> Any:
    """An xgrammar.CompiledGrammar; raises RuntimeError if the library refuses the guide."""
    import xgrammar

    if guided.kind == "json":
        return compiler.compile_builtin_json_grammar()
    if guided.kind == "regex":
        return compiler.compile_regex(guided.guide)
    if guided.kind == "choice":
        return compiler.compile_grammar(_choice_grammar(guided.guide))
    if guided.kind == "ebnf":
        return compiler.compile_grammar(guided.guide)
    grammar = str(xgrammar.Grammar.from_json_schema(guided.guide))
    corrected = without_control_characters(grammar)
    if corrected == grammar:
        return compiler.compile_json_schema(guided.guide)
    return compiler.compile_grammar(corrected)


def check_guide(guided: GuidedDecoding) -> None:
    """Raise RequestError for a guide that is too large, missing, or no list of choices, and for a schema
    that would not be kept."""
    if len(guided.guide) > MAX_GUIDE_CHARS:
        raise RequestError(
            f"guided {guided.kind}: the guide has {len(guided.guide)} characters; "
            f"at most {MAX_GUIDE_CHARS} are allowed"
        )
    if guided.kind == "choice":
        _choices(guided.guide)
    elif guided.kind == "json_schema":
        check_json_schema(guided.guide)
    elif guided.kind != "json" and not guided.guide:
        raise RequestError(f"guided {guided.kind}: the guide is empty")


def _choices(guide: str) -> list[str]:
    try:
        choices = json.loads(guide)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise RequestError("guided choice: the guide has to be a JSON list of strings, at least one")
    return choices


def _choice_grammar(guide: str) -> str:
    return "root ::= " + " | ".join(f'"{_escape(choice)}"' for choice in _choices(guide))


def _escape(text: str) -> str:
    """Text between the quotes of a string in xgrammar's EBNF."""
    return re.sub(r'["\\\x00-\x1f\x7f]', lambda match: f"\\x{ord(match[0]):02x}", text)


def _reason(error: RuntimeError) -> str:
    """The library's message without the place in its source."""
    reason = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).strip())
    return reason if len(reason) <= _MAX_REASON_CHARS else reason[:_MAX_REASON_CHARS] + "..."

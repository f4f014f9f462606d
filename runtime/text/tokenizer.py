"""Text to token ids: the tokenizer and the chat template that were saved beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trtforge.errors import ConfigError, RequestError
from trtforge.runtime.text.text_stream import TextStream, Vocabulary, load_vocabulary

# The names under which chat templates find the model's special tokens.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer in `folder`: tokenizer.json, tokenizer_config.json and, for chats, a template.

    Safe to use from several threads. Raises ConfigError if the files cannot be read or cannot be streamed.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: build the model again, its tokenizer is missing")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # A saved tokenizer may carry the padding and truncation of its training.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._vocabulary: Vocabulary = load_vocabulary(self._tokenizer)
        self._max_token_chars = max(len(token) for token in self._tokenizer.get_vocab())
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text()) if config_path.is_file() else {}
        self._special_tokens = _special_tokens(config)
        self._template = _load_template(folder, config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`, with the special tokens that the model expects around a prompt."""
        # The batch call gives up the interpreter's lock while it works: one long prompt must not stop
        # the thread that streams everybody's tokens.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def max_text_chars(self, num_tokens: int) -> int:
        """Characters beyond which no text has to be tokenized to know that it exceeds `num_tokens`."""
        return num_tokens * self._max_token_chars

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a chat, up to where the assistant's answer starts.

        Raises RequestError if the model has no chat template or the template refuses the messages.
        """
        if self._template is None:
            raise RequestError("messages: this model has no chat template, send text_input or input_ids")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"messages: the model's chat template refuses them: {error}") from None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of a chat; the template itself writes the special tokens. Raises as the template does."""
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text of `token_ids` without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def text_stream(self) -> TextStream:
        """A decoder of one growing sequence, for a `Detokenizer`."""
        return self._vocabulary.stream()


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}


def _load_template(folder: Path, config: Mapping[str, Any]) -> jinja2.Template | None:
    path = folder / "chat_template.jinja"
    source = path.read_text() if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    try:
        return _template_environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template in {folder} is not valid: {error}") from None


def _template_environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: the environment that transformers documents for them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; serving just renders them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)

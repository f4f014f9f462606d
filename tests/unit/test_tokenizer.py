from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from trtforge.errors import ConfigError, RequestError
from trtforge.runtime.text.tokenizer import Tokenizer

TEXTS = (
    "The quick brown fox.",
    "  two spaces, a tab\tand a line\n\n",
    "naïve 早上好 🎉 \x00 nul",
    "<|im_start|>user\nspecial tokens in text<|im_end|>",
    " ",
)
CHATS = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief. <|im_end|>"},
        {"role": "user", "content": "早上好\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "  and now?"},
    ],
)
# What chat templates in the wild use: loops with control flow, filters, namespaces, white space control.
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 > 2 %}{% break %}{% endif %}\n"
    "    {%- generation %}[{{ m['role'] | upper }}] {{ m['content'] | trim }}{{ eos_token }}"
    "{% endgeneration %}\n"
    "{% endfor %}\n    {% if add_generation_prompt %}\n[ASSISTANT]{% endif %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:"
    "{{ m | tojson }}{{ messages | length }}{% endfor %}{{ pad_token is defined }}{{ tools is none }}",
)


@pytest.fixture
def copy_tokenizer(tiny_tokenizer: Path, tmp_path: Path) -> Callable[..., Path]:
    """`copy_tokenizer(template)`: the tiny tokenizer with another template, or None for none."""

    def copy(template: str | None) -> Path:
        folder = tmp_path / "tokenizer"
        shutil.copytree(tiny_tokenizer, folder)
        if template is None:
            (folder / "chat_template.jinja").unlink()
        else:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return copy


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encode_and_decode_like_transformers(
    tiny_tokenizer: Path, text: str, add_special_tokens: bool
) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer)
    tokenizer = Tokenizer(tiny_tokenizer)
    token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    assert list(token_ids) == reference.encode(text, add_special_tokens=add_special_tokens)
    assert tokenizer.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=True)


def test_saved_padding_and_truncation_are_ignored(copy_tokenizer: Callable[..., Path]) -> None:
    folder = copy_tokenizer(None)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    reference.backend_tokenizer.enable_truncation(4)
    reference.backend_tokenizer.enable_padding(length=64)
    reference.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    assert len(tokenizer.encode("The quick brown fox jumps over the lazy dog.")) not in (4, 64)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_chat_like_transformers(
    tiny_tokenizer: Path,
    copy_tokenizer: Callable[..., Path],
    template: str | None,
    chat: list[dict[str, str]],
) -> None:
    folder = tiny_tokenizer if template is None else copy_tokenizer(template)
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer(folder)
    text = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokenizer.apply_chat_template(chat) == text
    assert list(tokenizer.encode_chat(chat)) == ids


@pytest.mark.parametrize("as_list", [True, False])
def test_template_inside_the_tokenizer_config(copy_tokenizer: Callable[..., Path], as_list: bool) -> None:
    folder = copy_tokenizer(None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ messages[0].content }}!"
    config["chat_template"] = [{"name": "default", "template": template}] if as_list else template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).apply_chat_template(CHATS[0]) == "Hello!"


def test_chat_without_template(copy_tokenizer: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(copy_tokenizer(None)).apply_chat_template(CHATS[0])


def test_chat_that_the_template_refuses(tiny_tokenizer: Path) -> None:
    with pytest.raises(RequestError, match="tools are not supported"):
        Tokenizer(tiny_tokenizer).apply_chat_template([{"role": "tool", "content": "42"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(messages[0]) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(copy_tokenizer: Callable[..., Path], template: str) -> None:
    with pytest.raises(RequestError, match="unsafe"):
        Tokenizer(copy_tokenizer(template)).apply_chat_template(CHATS[0])


def test_broken_template_is_refused_when_loaded(copy_tokenizer: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        Tokenizer(copy_tokenizer("{% for %}"))


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        Tokenizer(tmp_path)

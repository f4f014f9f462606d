"""Answers of random logits that have to keep to a guide."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from trtforge.errors import RequestError
from trtforge.runtime.request import GuidedDecoding, SamplingParams
from trtforge.runtime.sampling.grammar import GrammarCompiler
from trtforge.runtime.sampling.sampler import NO_TOKEN, Sampler
from trtforge.runtime.sampling.state import SamplingState

NUM_PADDING = 45  # the model's vocabulary is larger than the tokenizer's
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": 3, "maximum": 120},
        "kind": {"enum": ['é"\\', "b", None, 7]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
CHOICES = ["yes", "yes, but", "", "早上好 🎉", 'quote " and \\ and \n line', "]|[\x00\x7f", "\\x41"]
EBNF = 'root ::= "(" root ")" | [a-c]{1,3} "é"?'


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        value.keys() - {"tags"} == {"name", "size", "kind"}
        and len(value["name"]) <= 5
        and isinstance(value["size"], int)
        and 3 <= value["size"] <= 120
        and value["kind"] in ['é"\\', "b", None, 7]
        and all(isinstance(tag, bool) for tag in value.get("tags", [True]))
        and 1 <= len(value.get("tags", [True])) <= 3
    )


def is_json(text: str) -> bool:
    json.loads(text)
    return True


PATTERN = r"(0|[1-9]\d{0,3})-(é|[x-z]+)?(\.[\w ]{2}){1,2}"
GUIDES: list[tuple[GuidedDecoding, Callable[[str], bool]]] = [
    (GuidedDecoding("json"), is_json),
    (GuidedDecoding("json_schema", json.dumps(SCHEMA)), is_of_schema),
    (GuidedDecoding("regex", PATTERN), lambda text: re.fullmatch(PATTERN, text, re.ASCII) is not None),
    (GuidedDecoding("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    (GuidedDecoding("ebnf", EBNF), lambda text: re.fullmatch(r"(\(*)[a-c]{1,3}é?(\)*)", text) is not None),
]


class Guided:
    """A tokenizer's compiler and its model: random logits that prefer to end."""

    def __init__(self, folder: Path, eos_token_id: int) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size = self.tokenizer.get_vocab_size() + NUM_PADDING
        self.stops = frozenset({eos_token_id})
        self.compiler = GrammarCompiler(folder, self.vocab_size, self.stops)

    def state(self, guided: GuidedDecoding, seed: int, temperature: float = 1.0) -> SamplingState:
        params = SamplingParams(temperature=temperature, seed=seed, guided=guided)
        matcher = self.compiler.compile(guided).matcher()
        return SamplingState(params, array("i", [5, 6]), 2, self.stops, matcher)

    def logits(self, rng: np.random.Generator, num_rows: int) -> np.ndarray:
        logits = rng.standard_normal((num_rows, self.vocab_size)).astype(np.float32)
        logits[:, -NUM_PADDING:] += 5
        logits[:, sorted(self.stops)] += 3
        for token in ('"', "}", "]", ")"):
            token_id = self.tokenizer.token_to_id(token)
            if token_id is not None:
                logits[:, token_id] += 4
        return logits

    def answer(self, state: SamplingState) -> list[int]:
        return state.token_ids[state.num_prompt_tokens :].tolist()

    def text(self, state: SamplingState) -> str:
        """Without the stop token, decoded byte for byte."""
        answer = self.answer(state)
        assert answer.pop() in self.stops
        return self.tokenizer.decode(answer, skip_special_tokens=False)


@pytest.fixture(scope="module")
def byte_level(tiny_tokenizer: Path) -> Guided:
    return Guided(tiny_tokenizer, eos_token_id=2)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Guided:
    """A vocabulary like Llama's: byte tokens for what no piece covers, and a blank that is a piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*map(chr, range(0x21, 0x7F)), "▁", "▁yes", "é", "早上", "▁{", '":', '▁"', "true", "12", "),"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("byte_fallback")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Guided(folder, eos_token_id=2)


@pytest.fixture(params=["byte_level", "byte_fallback"])
def model(request: pytest.FixtureRequest) -> Guided:
    return request.getfixturevalue(request.param)


def test_every_finished_answer_keeps_to_its_guide_while_others_join_and_leave(model: Guided) -> None:
    rng, sampler = np.random.default_rng(0), Sampler(model.vocab_size)
    waiting = [(*GUIDES[n % len(GUIDES)], model.state(GUIDES[n % len(GUIDES)][0], n)) for n in range(100)]
    random.Random(0).shuffle(waiting)
    running: list[tuple[GuidedDecoding, Callable[[str], bool], SamplingState]] = []
    finished: dict[str, set[str]] = {}
    for _ in range(1500):
        while waiting and len(running) < 12 and rng.integers(2):
            running.append(waiting.pop())
        rng.shuffle(running)
        states = [state for _, _, state in running]
        lengths = [len(state.token_ids) for state in states]
        tokens = sampler.sample(model.logits(rng, len(states)), states, lengths).token_ids if states else []
        for (guided, is_right, state), token in zip(list(running), tokens, strict=True):
            assert 0 <= token < model.vocab_size - NUM_PADDING
            state.token_ids.append(token)
            state.accept(1)
            if token in model.stops:
                text = model.text(state)
                assert is_right(text), (guided.kind, text)
                finished.setdefault(guided.kind, set()).add(text)
                running = [entry for entry in running if entry[2] is not state]
            elif len(state.token_ids) > 300:
                running = [entry for entry in running if entry[2] is not state]
    assert not waiting
    assert finished.keys() == {guided.kind for guided, _ in GUIDES}
    assert len(finished["choice"]) > 3
    assert len(finished["regex"]) > 10


def test_speculation_gives_the_tokens_of_one_by_one(byte_level: Guided) -> None:
    rng, sampler = np.random.default_rng(1), Sampler(byte_level.vocab_size)
    for seed in range(20):
        guided, _ = GUIDES[seed % len(GUIDES)]
        logits = byte_level.logits(rng, 60)
        one_by_one, speculated = (byte_level.state(guided, seed) for _ in range(2))
        for row in logits:
            length = len(one_by_one.token_ids)
            (token,) = sampler.sample(row[None], [one_by_one], [length]).token_ids
            one_by_one.token_ids.append(token)
            one_by_one.accept(1)
            if token in byte_level.stops:
                break
        expected = byte_level.answer(one_by_one)
        while (done := len(byte_level.answer(speculated))) < len(expected):
            drafts = expected[done : done + int(rng.integers(6))]
            if drafts and rng.integers(2):
                drafts[rng.integers(len(drafts))] = int(rng.integers(byte_level.vocab_size))
            length, rows = len(speculated.token_ids), logits[done : done + len(drafts) + 1]
            speculated.token_ids.extend(drafts)
            lengths = range(length, length + len(rows))
            tokens = sampler.sample(rows, [speculated] * len(rows), lengths).token_ids
            del speculated.token_ids[length:]
            agreed = next(
                (i for i, (a, b) in enumerate(zip(drafts, tokens, strict=False)) if a != b), len(drafts)
            )
            accepted = [token for token in tokens[: agreed + 1] if token >= 0]
            speculated.token_ids.extend(accepted)
            speculated.accept(len(accepted))
        assert byte_level.answer(speculated) == expected


def test_forks_go_their_own_ways(byte_level: Guided) -> None:
    guided = GuidedDecoding("choice", '["aa", "bb"]')
    state = byte_level.state(guided, 0, temperature=0.0)
    fork = state.fork(array("i", state.token_ids), state.params)
    sampler = Sampler(byte_level.vocab_size)
    for one, char in ((state, "a"), (fork, "b")):
        token_id = byte_level.tokenizer.token_to_id(char)
        one.token_ids.append(token_id)
        one.accept(1)
        logits = np.zeros((1, byte_level.vocab_size), np.float32)
        assert sampler.sample(logits, [one], [len(one.token_ids)]).token_ids == [token_id]


def test_an_answer_ends_where_nothing_is_allowed(byte_level: Guided) -> None:
    """After the grammar's end, and where other options forbid all that the grammar allows."""
    guided = GuidedDecoding("choice", '["a"]')
    a = byte_level.tokenizer.token_to_id("a")
    logits = np.zeros((1, byte_level.vocab_size), np.float32)
    sampler = Sampler(byte_level.vocab_size)
    state = byte_level.state(guided, 0)
    tokens = []
    for _ in range(3):
        tokens += sampler.sample(logits, [state], [len(state.token_ids)]).token_ids
        if tokens[-1] >= 0:
            state.token_ids.append(tokens[-1])
            state.accept(1)
    assert tokens == [a, 2, NO_TOKEN]
    params = SamplingParams(guided=guided, bad_words_token_ids=((a,),))
    matcher = byte_level.compiler.compile(guided).matcher()
    barred = SamplingState(params, array("i", [5]), 1, byte_level.stops, matcher)
    assert sampler.sample(logits, [barred], [1]).token_ids == [NO_TOKEN]


@pytest.mark.parametrize(
    ("kind", "guide", "message"),
    [
        ("regex", "a(", "guided regex: Regex parsing error at position 3: The parenthesis is not closed"),
        ("regex", "(?=a)b", "Lookahead is not supported"),
        ("ebnf", "root ::= x", 'Rule "x" is not defined'),
        ("ebnf", 'root ::= root "a"', "guided ebnf: no answer can look like this"),
        ("json_schema", '{"type": "foo"}', 'Unsupported type "foo"'),
        ("json_schema", "false", "cannot accept any value"),
        ("json_schema", '{"items": {"not": {}}}', "#/items: not is not supported"),
        ("json_schema", '{"type": "number", "multipleOf": 2}', "for type integer only"),
        ("json_schema", '{"$defs": {"a": {"minimum": 2}}}', "#/\\$defs/a: minimum needs a type"),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "null"}]}', "merge them"),
        ("json_schema", '{"properties": {}, "anyOf": [{}]}', "properties beside anyOf"),
        ("json_schema", '{"properties": {"a": {}}, "required": ["b"]}', "required property 'b'"),
        ("json_schema", '{"type": "string", "pattern": "a\\\\n"}', "characters that JSON escapes"),
        ("json_schema", '{"items":' * 70 + "{}" + "}" * 70, "nested more than 64"),
        ("json_schema", "[" * 60000, "not valid JSON"),
    ],
)
def test_bad_guides_are_refused_with_the_reason(
    kind: str, guide: str, message: str, byte_level: Guided
) -> None:
    with pytest.raises(RequestError, match=message):
        byte_level.compiler.compile(GuidedDecoding(kind, guide))  # type: ignore[arg-type]


def test_torch_is_not_loaded_before_the_first_guided_request() -> None:
    code = (
        "import sys, pathlib, trtforge.runtime.engine.core, trtforge.runtime.sampling.grammar as grammar\n"
        "grammar.GrammarCompiler(pathlib.Path('nowhere'), 100, [2])\n"
        "sys.exit('torch' in sys.modules or 'xgrammar' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

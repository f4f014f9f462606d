"""Several answers, log-probabilities and their ends, between an EngineClient and a scripted engine."""

from __future__ import annotations

from typing import Any

import pytest

from trtforge.runtime.engine.messages import Cancel
from trtforge.runtime.outputs import EngineOutput, RequestStart, TokenLogprobs
from trtforge.runtime.request import GenerationRequest, SamplingParams


def letters(scripted: Any, text: str) -> tuple[int, ...]:
    """One token for each character."""
    return tuple(
        token_id
        for char in text
        for token_id in scripted.client.tokenizer.encode(char, add_special_tokens=False)
    )


def test_answers_end_one_by_one(scripted: Any) -> None:
    engine_id = scripted.submit(GenerationRequest("a", (1, 2), SamplingParams(n=3))).request_id
    x, y = letters(scripted, "xy")
    outputs = scripted.exchange(
        [
            EngineOutput(engine_id, (x,), index=2),
            EngineOutput(engine_id, (x, y), index=0),
            EngineOutput(engine_id, (y, 0), "stop", index=2),
            EngineOutput(engine_id, (y,), "length", index=0),
            EngineOutput(engine_id, (x,), "length", index=1),
        ],
        5,
    )
    assert [(o.index, o.text, o.finish_reason, o.num_generated_tokens, o.is_final) for o in outputs] == [
        (2, "x", None, 1, False),
        (0, "xy", None, 2, False),
        (2, "y", "stop", 3, False),
        (0, "y", "length", 3, False),
        (1, "x", "length", 1, True),
    ]


def test_a_stop_string_ends_its_answer_only(scripted: Any) -> None:
    sampling = SamplingParams(n=2, stop=("xy",))
    engine_id = scripted.submit(GenerationRequest("a", (1,), sampling)).request_id
    x, y, z = letters(scripted, "xyz")
    first, second = scripted.exchange(
        [EngineOutput(engine_id, (z, x), index=1), EngineOutput(engine_id, (y, z), index=1)], 2
    )
    assert (first.text, first.finish_reason) == ("z", None)
    # What the engine had computed beyond the stop string is no part of the answer.
    assert (second.text, second.token_ids, second.finish_reason) == ("", (y,), "stop")
    assert (second.num_generated_tokens, second.is_final) == (3, False)
    assert scripted.engine.next_cancel() == Cancel(engine_id, 1)
    # The engine hears of it late; and the last one is cancelled with its request.
    (last,) = scripted.exchange(
        [EngineOutput(engine_id, (z,), index=1), EngineOutput(engine_id, (x, y), index=0)], 1
    )
    assert (last.index, last.finish_reason, last.is_final) == (0, "stop", True)
    assert scripted.engine.next_cancel() == Cancel(engine_id, None)
    # Its id is free.
    scripted.submit(GenerationRequest("a", (1,), SamplingParams()))


def test_no_stop_string_before_min_tokens(scripted: Any) -> None:
    sampling = SamplingParams(stop=("ab",), min_tokens=3)
    engine_id = scripted.submit(GenerationRequest("a", (1,), sampling)).request_id
    a, b = letters(scripted, "ab")
    # The second one begins within the first three tokens.
    outputs = scripted.exchange([EngineOutput(engine_id, (token,)) for token in (a, b, a, b, a, b)], 6)
    assert "".join(output.text for output in outputs) == "abab"
    assert outputs[-1].finish_reason == "stop"


def test_logprobs(scripted: Any) -> None:
    sampling = SamplingParams(logprobs=1, prompt_logprobs=0, stop=("y",))
    engine_id = scripted.submit(GenerationRequest("a", (1, 2), sampling)).request_id
    x, y = letters(scripted, "xy")
    prompt = (TokenLogprobs(2, -3.0, 9),)
    logprobs = tuple(TokenLogprobs(token, -0.5, 2, ((7, -0.25),)) for token in (x, y, x))
    piece, first, last = scripted.exchange(
        [
            EngineOutput(engine_id, (), prompt_logprobs=prompt),
            EngineOutput(engine_id, (x,), logprobs=logprobs[:1], start=RequestStart(0.1, 1)),
            EngineOutput(engine_id, (x, y, x), logprobs=(logprobs[0], *logprobs[1:])),
        ],
        3,
    )
    assert (piece.prompt_logprobs, piece.token_ids) == (prompt, ())
    assert (first.logprobs, first.cumulative_logprob, first.start) == (
        logprobs[:1],
        -0.5,
        RequestStart(0.1, 1),
    )
    # Cut like the tokens.
    assert (last.logprobs, last.cumulative_logprob) == (logprobs[:2], -1.5)


@pytest.mark.parametrize(
    ("reason", "kind"), [("error", "timeout"), ("error", "capacity"), ("cancelled", "server")]
)
def test_an_error_ends_all_answers(scripted: Any, reason: str, kind: str) -> None:
    engine_id = scripted.submit(GenerationRequest("a", (1,), SamplingParams(n=2))).request_id
    (x,) = letters(scripted, "x")
    end = EngineOutput(engine_id, (), reason, error="too slow", error_kind=kind)  # type: ignore[arg-type]
    outputs = scripted.exchange(
        [EngineOutput(engine_id, (x,), "length"), end, EngineOutput(engine_id, (x,), index=1)], 2
    )
    assert (outputs[1].finish_reason, outputs[1].is_final) == (reason, True)
    assert (outputs[1].error, outputs[1].error_kind) == ("too slow", kind)
    scripted.submit(GenerationRequest("a", (1,), SamplingParams()))
    assert not scripted.has_more()


def test_what_the_engine_is_told(scripted: Any) -> None:
    sampling = SamplingParams(bad_words=("lazy", " lazy dog"), bad_words_token_ids=((5, 6),))
    request = GenerationRequest("a", "Hi", sampling, priority=-2, timeout_s=1.5, cache_salt="s")
    told = scripted.submit(request)
    assert (told.priority, told.timeout_s, told.cache_salt) == (-2, 1.5, "s")
    tokenizer = scripted.client.tokenizer
    forms = ["lazy", " lazy", "lazy dog", " lazy dog"]
    assert told.sampling.bad_words_token_ids == (
        *(tokenizer.encode(form, add_special_tokens=False) for form in forms),
        (5, 6),
    )
    assert told.sampling.seed is None  # greedy
    told = scripted.submit(GenerationRequest("b", "Hi", SamplingParams(temperature=1.0)))
    assert told.sampling.seed is not None
    assert told.timeout_s == 7.0  # the model's default

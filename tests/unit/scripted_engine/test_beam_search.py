"""The driver of beam search, on an engine whose log-probabilities are a function of the tokens before."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from trtforge.errors import RequestError
from trtforge.runtime.beam_selection import BeamSelection
from trtforge.runtime.engine.messages import Add
from trtforge.runtime.outputs import EngineOutput, GenerationOutput, RequestStart, TokenLogprobs
from trtforge.runtime.request import EngineRequest, GenerationRequest, SamplingParams

PROMPT = (9, 8, 7)
VOCAB_SIZE = 40
SAMPLING = SamplingParams(
    beam_width=4, n=3, max_tokens=6, stop_token_ids=(1, 2, 3), length_penalty=0.5, logprobs=2
)


def likeliest(token_ids: tuple[int, ...], num: int) -> tuple[tuple[int, float], ...]:
    rng = random.Random(str(token_ids))
    tokens = [(token_id, -rng.uniform(0.1, 6.0)) for token_id in range(VOCAB_SIZE)]
    return tuple(sorted(tokens, key=lambda entry: -entry[1])[:num])


def step(request: EngineRequest) -> EngineOutput:
    assert request.sampling.logprobs is not None
    top = likeliest(request.prompt_token_ids, request.sampling.logprobs)
    token_id, logprob = top[0]
    return EngineOutput(
        request.request_id,
        (token_id,),
        "length",
        logprobs=(TokenLogprobs(token_id, logprob, 1, top),),
        start=RequestStart(0.0, 2),
    )


def serve(scripted: Any, num_requests: int | None = None) -> None:
    """Answer requests, the later ones of those that are there first; forever or so many."""
    while num_requests is None or num_requests > 0:
        messages = [scripted.engine.sent.get()]
        while not scripted.engine.sent.empty():
            messages.append(scripted.engine.sent.get())
        requests = [message.request for message in messages if isinstance(message, Add)]
        scripted.engine.say(*(step(request) for request in reversed(requests)))
        if num_requests is not None:
            num_requests -= len(requests)


def start(scripted: Any, sampling: SamplingParams = SAMPLING) -> None:
    request = GenerationRequest("a", PROMPT, sampling, priority=3, cache_salt="s")
    scripted.start(request)


def test_the_best_beams_come_as_answers(scripted: Any) -> None:
    threading.Thread(target=serve, args=(scripted,), daemon=True).start()
    start(scripted)
    answers = [scripted.next_output() for _ in range(3)]

    selection = BeamSelection(4, 6, frozenset((1, 2, 3)), 0.5)
    while not selection.is_over:
        selection.advance([likeliest(PROMPT + beam.token_ids, 7) for beam in selection.running])
    expected = [hypothesis.beam for hypothesis in selection.best(3)]
    assert [answer.token_ids for answer in answers] == [beam.token_ids for beam in expected]
    assert [answer.cumulative_logprob for answer in answers] == [beam.cumulative_logprob for beam in expected]
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert [answer.is_final for answer in answers] == [False, False, True]
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        check_answer(scripted, answer)
    assert answers[0].start == RequestStart(0.0, 2)
    # The id is free again.
    start(scripted)
    assert scripted.next_output() == answers[0]


def check_answer(scripted: Any, answer: GenerationOutput) -> None:
    stopped = answer.token_ids[-1] in SAMPLING.stop_token_ids
    assert answer.finish_reason == ("stop" if stopped else "length")
    assert answer.text == scripted.client.tokenizer.decode(
        answer.token_ids[:-1] if stopped else answer.token_ids
    )
    assert answer.logprobs is not None
    for position, entry in enumerate(answer.logprobs):
        ranked = likeliest(PROMPT + answer.token_ids[:position], VOCAB_SIZE)
        assert ranked[entry.rank - 1] == (entry.token_id, entry.logprob)
        assert entry.top == ranked[:2]


def test_steps_are_small_requests_with_the_request_s_own_terms(scripted: Any) -> None:
    start(scripted)
    first = scripted.engine.next_request()
    assert first.sampling == SamplingParams(max_tokens=1, ignore_eos=True, logprobs=7)
    assert (first.prompt_token_ids, first.priority, first.cache_salt) == (PROMPT, 3, "s")
    scripted.engine.say(step(first))
    second = [scripted.engine.next_request() for _ in range(4)]
    assert [request.prompt_token_ids[:-1] for request in second] == [PROMPT] * 4
    assert len({request.prompt_token_ids for request in second}) == 4


def test_cancel_and_errors_end_the_whole(scripted: Any) -> None:
    start(scripted)
    scripted.engine.say(step(scripted.engine.next_request()))
    requests = [scripted.engine.next_request() for _ in range(4)]
    scripted.client.cancel("a")
    assert {scripted.engine.next_cancel().request_id for _ in range(4)} == {r.request_id for r in requests}
    scripted.engine.say(*(EngineOutput(request.request_id, (), "cancelled") for request in requests))
    last = scripted.next_output()
    assert (last.request_id, last.finish_reason, last.is_final) == ("a", "cancelled", True)

    start(scripted)
    scripted.engine.say(step(scripted.engine.next_request()))
    requests = [scripted.engine.next_request() for _ in range(4)]
    failed = EngineOutput(requests[2].request_id, (), "error", error="slow", error_kind="timeout")
    scripted.engine.say(step(requests[0]), failed)
    last = scripted.next_output()
    assert (last.finish_reason, last.error, last.error_kind) == ("error", "slow", "timeout")
    assert not scripted.has_more()


@pytest.mark.parametrize(
    ("sampling", "mentioned"),
    [
        (SamplingParams(beam_width=17), "1 to 16"),
        (SamplingParams(beam_width=2, n=3), "at most beam_width, 2"),
        (SamplingParams(beam_width=2, temperature=0.5), "temperature is given with beam_width 2"),
        (SamplingParams(beam_width=2, stop=("x",)), "stop is given"),
        (SamplingParams(beam_width=2, repetition_penalty=1.5), "repetition_penalty is given"),
        (SamplingParams(beam_width=2, prompt_logprobs=0), "prompt_logprobs is given"),
        (SamplingParams(beam_width=2, stop_token_ids=tuple(range(17))), "17 stop_token_ids"),
    ],
)
def test_what_beam_search_does_not_do(scripted: Any, sampling: SamplingParams, mentioned: str) -> None:
    with pytest.raises(RequestError, match=mentioned):
        start(scripted, sampling)

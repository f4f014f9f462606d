"""The options of a request on a real tritonserver, with the fake executor behind it."""

from __future__ import annotations

import json
import math
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trtforge.client.protocol import Guide
from trtforge.client.streaming import Client, Completion, RequestOptions, SamplingOptions
from trtforge.client.triton_server import TritonServer
from trtforge.errors import RequestError, RequestTimeoutError

pytestmark = pytest.mark.e2e

PROMPT = "The quick brown fox"
MAX_MODEL_LEN = 64 * 1024


@pytest.fixture(scope="module")
def server(
    make_fake_repository: Callable[..., Path], triton_server: Callable[[Path], TritonServer]
) -> TritonServer:
    return triton_server(make_fake_repository(num_blocks=MAX_MODEL_LEN // 16, max_model_len=MAX_MODEL_LEN))


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


def generate(client: Client, prompt: str = PROMPT, **values: Any) -> Completion:
    return client.generate(prompt, sampling=SamplingOptions(**values), timeout_s=60)


def streamed(client: Client, num_answers: int, **values: Any) -> list[str]:
    texts = [""] * num_answers
    for chunk in client.stream(PROMPT, sampling=SamplingOptions(**values), timeout_s=60):
        texts[chunk.index] += chunk.text
    return texts


def texts_of(completion: Completion) -> list[str]:
    return [answer.text for answer in (completion, *completion.others)]


# --------------------------------------------------------------------------- several answers


def test_n_answers(client: Client) -> None:
    options = {"n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    whole = generate(client, **options)
    texts = texts_of(whole)
    assert len(set(texts)) == 3
    assert [answer.num_output_tokens for answer in (whole, *whole.others)] == [12, 12, 12]
    assert streamed(client, 3, **options) == texts
    # Answers have random numbers of their own: the first is that of n = 1.
    assert generate(client, **options | {"n": 1}).text == texts[0]


def test_a_stop_string_ends_one_answer_only(client: Client) -> None:
    options = {"n": 2, "max_tokens": 40, "temperature": 1.0, "seed": 6}
    first, second = texts_of(generate(client, **options))
    stop = next(first[i : i + 3] for i in range(len(first) - 3) if first[i : i + 3] not in second)
    stopped = generate(client, **options, stop_words=(stop,))
    assert texts_of(stopped) == [first[: first.index(stop)], second]
    assert [stopped.finish_reason, stopped.others[0].finish_reason] == ["stop", "length"]


def test_beam_search(client: Client) -> None:
    best = generate(client, beam_width=4, n=4, max_tokens=6, logprobs=1)
    beams = (best, *best.others)
    assert len({beam.token_ids for beam in beams}) == 4
    scores = [beam.cumulative_logprob for beam in beams]
    assert scores == sorted(scores, reverse=True)  # all have the same length
    greedy = generate(client, max_tokens=6, logprobs=0)
    assert best.cumulative_logprob >= greedy.cumulative_logprob - 1e-3


def test_the_widest_beam_search(client: Client) -> None:
    best = generate(client, beam_width=16, n=16, max_tokens=3, stop_token_ids=tuple(range(300, 316)))
    assert len({answer.token_ids for answer in (best, *best.others)}) == 16


# --------------------------------------------------------------------------- log-probabilities


def test_logprobs(client: Client) -> None:
    answer = generate(client, max_tokens=5, logprobs=3, prompt_logprobs=2)
    assert answer.logprobs is not None
    assert [entry.token.token_id for entry in answer.logprobs] == list(answer.token_ids)
    for entry in answer.logprobs:
        assert entry.token == entry.top[0]  # greedy
        assert [token.rank for token in entry.top] == [1, 2, 3]
        assert sum(math.exp(token.logprob) for token in entry.top) < 1
    total = sum(entry.token.logprob for entry in answer.logprobs)
    assert answer.cumulative_logprob == pytest.approx(total, rel=1e-4)
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == answer.num_input_tokens
    assert answer.prompt_logprobs[0] is None


def test_prompt_logprobs_are_those_of_an_answer(client: Client) -> None:
    answer = generate(client, max_tokens=6, logprobs=2)
    prompt_ids = client_prompt_ids(client)
    again = client.generate(
        input_ids=[*prompt_ids, *answer.token_ids], sampling=SamplingOptions(max_tokens=1, prompt_logprobs=2)
    )
    assert again.prompt_logprobs is not None
    assert answer.logprobs is not None
    scored = again.prompt_logprobs[len(prompt_ids) :]
    assert [entry and entry.token.token_id for entry in scored] == list(answer.token_ids)
    for entry, expected in zip(scored, answer.logprobs, strict=True):
        assert entry is not None
        assert entry.token.logprob == pytest.approx(expected.token.logprob, abs=1e-4)


def client_prompt_ids(client: Client) -> list[int]:
    """Token ids of PROMPT, as its log-probabilities name them; a prompt starts with token 0."""
    scored = generate(client, max_tokens=1, prompt_logprobs=0).prompt_logprobs or ()
    return [0, *(entry.token.token_id for entry in scored if entry is not None)]


def test_both_conventions_over_http(server: TritonServer) -> None:
    body = {
        "text_input": PROMPT,
        "max_tokens": 3,
        "return_log_probs": True,
        "return_cumulative_logprob": True,
        "sampling_parameters": '{"logprobs": "1", "n": "2", "temperature": "1.0"}',
        "return_num_output_tokens": True,
    }
    request = urllib.request.Request(f"{server.http_url}/v2/models/llm/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert len(answer["text_output"]) == 2
    assert answer["num_output_tokens"] == [3, 3]
    assert answer["cum_log_probs"] == answer["cumulative_logprob"]
    assert len(answer["output_log_probs"]) == 6
    assert sum(answer["output_log_probs"][:3]) == pytest.approx(answer["cum_log_probs"][0], rel=1e-4)
    assert [len(json.loads(text)) for text in answer["logprobs"]] == [3, 3]


# --------------------------------------------------------------------------- which tokens


def test_bad_words_and_biases(client: Client) -> None:
    plain = generate(client, max_tokens=8)
    biased = generate(client, max_tokens=8, logit_bias={plain.token_ids[0]: -100.0})
    assert biased.token_ids[0] != plain.token_ids[0]
    forced = generate(client, max_tokens=8, logit_bias={77: 100.0})
    assert forced.token_ids == (77,) * 8
    bad = generate(client, max_tokens=8, logit_bias={77: 100.0}, bad_words=(forced.text[:1],))
    assert bad.token_ids != forced.token_ids


def test_min_tokens(client: Client) -> None:
    plain = generate(client, max_tokens=20)
    stops = plain.token_ids[:3]
    assert generate(client, max_tokens=20, stop_token_ids=stops).num_output_tokens == 1
    longer = generate(client, max_tokens=20, stop_token_ids=stops, min_tokens=9)
    assert longer.num_output_tokens > 9
    assert not set(longer.token_ids[:9]) & set(stops)


@pytest.mark.parametrize(
    ("guide", "matches"),
    [
        (Guide("regex", "(yes|no)!"), lambda text: text in ("yes!", "no!")),
        (Guide("choice", '["left", "right"]'), lambda text: text in ("left", "right")),
        (
            Guide("json_schema", '{"type": "object", "properties": {"a": {"type": "boolean"}}, '
                  '"required": ["a"], "additionalProperties": false}'),
            lambda text: isinstance(json.loads(text)["a"], bool),
        ),
        (Guide("ebnf_grammar", 'root ::= "a" "b"?'), lambda text: text in ("a", "ab")),
    ],
)  # fmt: skip
def test_guides(client: Client, guide: Guide, matches: Callable[[str], bool]) -> None:
    answer = generate(client, guide=guide, max_tokens=60)
    assert matches(answer.text), answer.text


def test_a_guide_that_cannot_be_compiled_is_the_request_s_fault(client: Client) -> None:
    with pytest.raises(RequestError):
        generate(client, guide=Guide("regex", "(("))
    assert generate(client, max_tokens=1).num_output_tokens == 1


# --------------------------------------------------------------------------- scheduling


def test_timeouts(client: Client, server: TritonServer) -> None:
    started = time.monotonic()
    with pytest.raises(RequestTimeoutError):
        client.generate(
            PROMPT,
            sampling=SamplingOptions(max_tokens=MAX_MODEL_LEN - 100),
            options=RequestOptions(timeout_ms=300),
            timeout_s=60,
        )
    assert time.monotonic() - started < 20
    body = {"text_input": PROMPT, "max_tokens": MAX_MODEL_LEN - 100, "timeout_ms": 300}
    request = urllib.request.Request(f"{server.http_url}/v2/models/llm/generate", json.dumps(body).encode())
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert "TIMEOUT: " in error.value.read().decode()


def test_cached_prefixes(client: Client) -> None:
    prompt = "A long prompt that nobody else uses. " * 12

    def cached(salt: str) -> int:
        options = RequestOptions(cache_salt=salt)
        answer = client.generate(prompt, sampling=SamplingOptions(max_tokens=1), options=options)
        assert answer.num_cached_tokens is not None
        return answer.num_cached_tokens

    assert cached("a") == 0
    assert cached("a") > 64
    assert cached("b") == 0


def test_a_more_urgent_request_overtakes(client: Client) -> None:
    # Two of these do not fit into the cache together.
    big = SamplingOptions(max_tokens=MAX_MODEL_LEN - 10)
    half = MAX_MODEL_LEN * 5 // 8
    order: list[str] = []

    def ask(name: str, priority: int) -> None:
        options = RequestOptions(priority=priority)
        prompt = [priority] * half  # one that shares no blocks
        client.generate(
            input_ids=prompt, sampling=SamplingOptions(max_tokens=2), options=options, timeout_s=60
        )
        order.append(name)

    with client.stream(input_ids=[9] * half, sampling=big, timeout_s=60) as running:
        next(running)
        threads = [threading.Thread(target=ask, args=args) for args in (("patient", 5), ("urgent", 1))]
        for thread in threads:
            thread.start()
            time.sleep(0.3)
    for thread in threads:
        thread.join()
    assert order == ["urgent", "patient"]

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from trtforge import wire
from trtforge.runtime.outputs import GenerationOutput, RequestStart, TokenLogprobs
from trtforge.runtime.triton.requests import ResponseOptions
from trtforge.runtime.triton.responses import Answers, Arrays

DTYPES = {"STRING": np.object_, "INT32": np.int32, "FP32": np.float32}
SPECS = {spec.name: spec for spec in wire.RESPONSE_TENSORS}
EVERYTHING = frozenset(SPECS) - {"text_output", "output_ids"}


def answers(*, stream: bool, n: int = 1, prefix: str = "", outputs: frozenset[str] = EVERYTHING) -> Answers:
    return Answers(ResponseOptions(stream, n, prefix, outputs), lambda token_id: f"<{token_id}>")


def output(
    text: str, token_ids: tuple[int, ...], reason: Any = None, index: int = 0, **values: Any
) -> GenerationOutput:
    logprobs = tuple(TokenLogprobs(i, -i / 4, 1, ((i, -i / 4), (0, -9.0))) for i in token_ids)
    values = {"logprobs": logprobs, "cumulative_logprob": -1.5, "num_generated_tokens": 7} | values
    return GenerationOutput("a", text, token_ids, reason, num_prompt_tokens=3, index=index, **values)


def plain(arrays: Arrays) -> dict[str, Any]:
    """Their elements, after a check that the configuration of the model allows them."""
    for name, array in arrays.items():
        assert array.dtype == DTYPES[SPECS[name].data_type]
        assert array.ndim == len(SPECS[name].dims)
    return {
        name: [item.decode() if isinstance(item, bytes) else item for item in array.tolist()]
        for name, array in arrays.items()
    }


def test_a_stream_s_responses_hold_one_answer_s_news() -> None:
    collected = answers(stream=True, n=2)
    prompt = (TokenLogprobs(5, -0.5, 1), TokenLogprobs(6, -np.inf, 99))
    collected.add(output("", (), prompt_logprobs=prompt, num_generated_tokens=0))
    assert collected.take() == []
    collected.add(output("a", (1,), start=RequestStart(0.0, 2)))
    collected.add(output("x", (3,), "stop", index=1))
    collected.add(output("b", (2, 1)))
    first, second = map(plain, collected.take())
    entries = json.loads(first.pop("logprobs")[0])
    assert list(entries[1].items()) == [
        ("2", {"logprob": -0.5, "rank": 1, "decoded_token": "<2>"}),
        ("0", {"logprob": -9.0, "rank": 2, "decoded_token": "<0>"}),
    ]
    nothing, known, impossible = json.loads(first.pop("prompt_logprobs")[0])
    assert nothing is None
    assert known == {"5": {"logprob": -0.5, "rank": 1, "decoded_token": "<5>"}}
    assert impossible["6"]["logprob"] == -9999.0
    assert first == {
        "text_output": ["ab"],
        "output_ids": [1, 2, 1],
        "sequence_index": [0],
        "finish_reason": [""],
        "num_input_tokens": [3],
        "num_output_tokens": [7],
        "num_cached_tokens": [2],
        "cum_log_probs": [-1.5],
        "cumulative_logprob": [-1.5],
        "output_log_probs": [[-0.25, -0.5, -0.25]],
    }
    assert (second["text_output"], second["sequence_index"]) == (["x"], [1])
    assert second["finish_reason"] == ["stop"]
    assert "prompt_logprobs" not in second
    assert collected.take() == []


def test_a_whole_response_holds_all_answers() -> None:
    collected = answers(stream=False, n=2, prefix="Say: ")
    for piece in (
        output("a", (1,), num_generated_tokens=1),
        output("x", (3,), "length", index=1, num_generated_tokens=1, cumulative_logprob=-0.75),
        output("b", (2,), "stop", num_generated_tokens=2, is_final=True),
    ):
        assert collected.take() == []
        collected.add(piece)
    (response,) = map(plain, collected.take())
    assert [len(json.loads(text)) for text in response.pop("logprobs")] == [2, 1]
    assert response == {
        "text_output": ["Say: ab", "Say: x"],
        "output_ids": [1, 2, 3],
        "sequence_index": [0, 1],
        "finish_reason": ["stop", "length"],
        "num_input_tokens": [3],
        "num_output_tokens": [2, 1],
        "cum_log_probs": [-1.5, -0.75],
        "cumulative_logprob": [-1.5, -0.75],
        "output_log_probs": [[-0.25, -0.5], [-0.75, 0.0]],
    }


@pytest.mark.parametrize("stream", [True, False])
def test_only_what_was_asked_for(stream: bool) -> None:
    collected = answers(stream=stream, outputs=frozenset())
    collected.add(output("a", (1,), "stop", is_final=True))
    (response,) = map(plain, collected.take())
    assert response == {"text_output": ["a"], "output_ids": [1]}

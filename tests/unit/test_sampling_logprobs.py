from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from trtforge.runtime.outputs import TokenLogprobs
from trtforge.runtime.request import SamplingParams
from trtforge.runtime.sampling.logprobs import prompt_logprobs
from trtforge.runtime.sampling.sampler import INVALID_TOKEN, Sampler
from trtforge.runtime.sampling.state import SamplingState
from trtforge.runtime.sampling.topk import largest


def check(found: TokenLogprobs, logits: np.ndarray, num_top: int) -> None:
    exact = torch.from_numpy(logits).double().log_softmax(dim=-1)
    assert found.logprob == pytest.approx(float(exact[found.token_id]), abs=1e-6)
    order = torch.sort(exact, descending=True, stable=True).indices.tolist()
    assert found.rank == 1 + order.index(found.token_id)
    assert [token_id for token_id, _ in found.top] == order[:num_top]
    assert [logprob for _, logprob in found.top] == pytest.approx(exact[order[:num_top]].tolist(), abs=1e-6)


@pytest.mark.parametrize("vocab_size", [5, 700, 20000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_equal_log_softmax_of_the_raw_logits(vocab_size: int, num_top: int) -> None:
    rng = np.random.default_rng(num_top)
    logits = (rng.standard_normal((6, vocab_size)) * 4).astype(np.float32)
    logits[3:] = np.round(logits[3:])  # ties
    logits[5, 1:] = -np.inf
    next_token_ids = [*rng.integers(vocab_size, size=5).tolist(), 0]
    num_top = min(num_top, vocab_size)
    found = prompt_logprobs(logits, next_token_ids, num_top)
    assert [one.token_id for one in found] == next_token_ids
    for one, row in zip(found, logits, strict=True):
        check(one, row, num_top)


def test_only_entries_that_ask_get_logprobs_of_what_the_model_said() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, 300)).astype(np.float32)
    logits[3, 0] = np.nan
    asked = SamplingParams(temperature=5.0, seed=1, top_k=50, logit_bias=((7, 50.0),), logprobs=3)
    states = [
        SamplingState(params, array("i", [1]), 1, frozenset())
        for params in (asked, SamplingParams(temperature=1.0, seed=1), SamplingParams(logprobs=0), asked)
    ]
    sampled = Sampler(300).sample(logits, states, [1] * 4)
    assert sampled.logprobs is not None
    assert sampled.token_ids[0] == 7
    check(sampled.logprobs[0], logits[0], 3)
    assert sampled.logprobs[1] is None
    check(sampled.logprobs[2], logits[2], 0)
    assert sampled.logprobs[2].rank == 1
    assert (sampled.token_ids[3], sampled.logprobs[3]) == (INVALID_TOKEN, None)
    assert Sampler(300).sample(logits, states[1:2], [1]).logprobs is None


def test_prompt_logprobs_of_invalid_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        prompt_logprobs(np.array([[0, 1], [np.nan, 2]], np.float32), [0, 1], 1)


@pytest.mark.parametrize("size", [3, 64, 1000, 9999])
def test_largest_are_those_of_a_sort(size: int) -> None:
    rng = np.random.default_rng(size)
    for scale in (1, 1000):
        values = np.round(rng.standard_normal(size) * scale).astype(np.float32)
        values[rng.random(size) < 0.3] = -np.inf
        for k in (1, 2, size // 50 + 1, size - 1):
            kth = np.sort(values)[size - k]
            assert largest(values, k).tolist() == np.flatnonzero(values >= kth).tolist()

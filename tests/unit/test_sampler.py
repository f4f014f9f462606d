from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from trtforge.runtime.request import SamplingParams
from trtforge.runtime.sampling import filters, sampler
from trtforge.runtime.sampling.sampler import INVALID_TOKEN, Sampler
from trtforge.runtime.sampling.state import SamplingState, needs_state

LARGEST_UNIFORM = float(np.nextafter(1.0, 0.0))


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_rows, vocab_size)) * scale).astype(np.float32)


def warped_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What transformers' generate would sample from, in float64."""
    scores = torch.from_numpy(logits).double()[None]
    scores = TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    if params.typical_p < 1:
        scores = TypicalLogitsWarper(params.typical_p)(None, scores)
    return scores.softmax(dim=-1)[0].numpy()


def token_weights(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Of every token, whether it is a candidate or not."""
    candidates, weights = filters.token_weights(logits, params)
    if candidates is None:
        return weights
    everywhere = np.zeros_like(logits)
    everywhere[candidates] = weights
    return everywhere


def sample(logits: np.ndarray, params: Sequence[SamplingParams], positions: Sequence[int]) -> np.ndarray:
    """Tokens of sequences without prompts that have generated `positions` tokens."""
    states = []
    for one, position in zip(params, positions, strict=True):
        token_ids = array("i", [0] * position)
        states.append(SamplingState(one, token_ids, 0, frozenset()) if needs_state(one) else None)
    return np.array(Sampler(logits.shape[1]).sample(logits, states, positions).token_ids)


@pytest.mark.parametrize("typical_p", [1.0, 0.5])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.001])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_weights_equal_the_warpers_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )
    for scale in (0.1, 3.0, 20.0):
        (logits,) = random_logits(1, 700, scale=scale)
        expected = warped_probabilities(logits, params)
        weights = token_weights(logits, params)
        assert not weights[expected == 0].any()
        # Ours are float32: below its range they are 0 without having been removed.
        assert (expected[weights == 0] < 1e-37).all()
        np.testing.assert_allclose(weights / weights.sum(dtype=np.float64), expected, rtol=2e-5, atol=1e-37)


def test_equal_logits_are_kept_or_removed_together() -> None:
    logits = np.array([1, 5, 3, 5, 3, 3, 0], dtype=np.float32)
    for params, kept in (
        (SamplingParams(temperature=1.0, top_k=1), [1, 3]),
        (SamplingParams(temperature=1.0, top_k=3), [1, 2, 3, 4, 5]),
        (SamplingParams(temperature=1.0, top_p=0.1), [1, 3]),
        (SamplingParams(temperature=1.0, top_p=0.9), [1, 2, 3, 4, 5]),
    ):
        assert np.flatnonzero(token_weights(logits, params)).tolist() == kept


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([[0, 2, 2], [3, 1, 2], [-np.inf, -5, -np.inf]], dtype=np.float32)
    assert sample(logits, [SamplingParams()] * 3, [0, 1, 2]).tolist() == [1, 0, 1]


MIXED_PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=20, seed=2),
    SamplingParams(temperature=1.3, top_p=0.9, seed=3),
    SamplingParams(temperature=0.9, min_p=0.05, seed=2**64 - 1),
    SamplingParams(temperature=1.0, top_k=50, top_p=0.8, min_p=0.01, seed=0),
]


def test_batch_mates_do_not_change_a_token() -> None:
    rng = np.random.default_rng(5)
    params = MIXED_PARAMS * 6
    positions = rng.integers(1000, size=len(params)).tolist()
    logits = random_logits(len(params), 3001)
    together = sample(logits, params, positions).tolist()
    alone = [
        int(sample(logits[row : row + 1].copy(), params[row : row + 1], positions[row : row + 1])[0])
        for row in range(len(params))
    ]
    assert together == alone
    order = rng.permutation(len(params))
    shuffled = sample(logits[order], [params[row] for row in order], [positions[row] for row in order])
    assert shuffled.tolist() == [alone[row] for row in order]


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(len(MIXED_PARAMS), 100)
    before = logits.copy()
    sample(logits, MIXED_PARAMS, [0] * len(MIXED_PARAMS))
    assert np.array_equal(logits, before)


def test_seed_and_position_alone_choose_among_equal_rows() -> None:
    logits = np.zeros((64, 4096), dtype=np.float32)
    seeds = [SamplingParams(temperature=1.0, seed=seed) for seed in range(64)]
    by_seed = sample(logits, seeds, [0] * 64)
    by_position = sample(logits, seeds[:1] * 64, range(64))
    assert np.array_equal(by_seed, sample(logits, seeds, [0] * 64))
    # 64 draws among 4096 tokens: more than a few coincidences mean a stream is repeated or shifted.
    assert len(set(by_seed.tolist())) > 58
    assert len(set(by_position.tolist())) > 58
    assert len(set(by_seed.tolist()) | set(by_position.tolist())) > 117


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    ("vocab_size", "params"),
    [
        (12, SamplingParams(temperature=1.0, seed=7)),
        (12, SamplingParams(temperature=2.0, top_k=6, top_p=0.9, min_p=0.01, seed=7)),
        (600, SamplingParams(temperature=1.5, seed=7)),  # several chunks of the cumulative distribution
    ],
)
def test_frequencies_follow_the_probabilities(vocab_size: int, params: SamplingParams, vary: str) -> None:
    num_draws = 4096
    logits = random_logits(1, vocab_size, scale=1.0)
    rows = np.broadcast_to(logits, (num_draws, vocab_size))
    if vary == "seed":
        tokens = sample(rows, [replace(params, seed=seed) for seed in range(num_draws)], [3] * num_draws)
    else:
        tokens = sample(rows, [params] * num_draws, range(num_draws))
    expected = warped_probabilities(logits[0], params) * num_draws
    counts = np.bincount(tokens, minlength=vocab_size)
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    # Mean of the statistic plus five standard deviations.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 300), (LARGEST_UNIFORM, 700)])
@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_removed_tokens_are_never_drawn_at_the_ends(
    uniform: float, expected: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: uniform)
    # Many rows of weights that differ by orders of magnitude: their sums are rounded, up or down.
    logits = np.full((64, 1200), -np.inf, dtype=np.float32)
    logits[:, 300:701] = random_logits(64, 401)
    logits[:, [300, 700]] = 12
    params = SamplingParams(temperature=0.37, top_p=top_p, seed=0)
    assert sample(logits, [params] * 64, [0] * 64).tolist() == [expected] * 64


def test_rows_that_are_not_finite_are_marked_and_the_others_go_on() -> None:
    params = [replace(MIXED_PARAMS[row % len(MIXED_PARAMS)], top_k=0) for row in range(8)]
    logits = random_logits(8, 500)
    expected = sample(logits, params, [4] * 8)
    logits[0, 3] = np.nan
    logits[1, 499] = np.nan
    logits[4, 7] = np.inf
    logits[5] = -np.inf
    logits[6] = np.nan
    expected[[0, 1, 4, 5, 6]] = INVALID_TOKEN
    assert np.array_equal(sample(logits, params, [4] * 8), expected)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-320, seed=0),
        SamplingParams(temperature=1e-5, seed=0),
        SamplingParams(temperature=1.0, top_k=1, seed=0),
        SamplingParams(temperature=1.0, top_p=1e-300, seed=0),
        SamplingParams(temperature=1.0, min_p=1.0, seed=0),
    ],
)
def test_extreme_parameters_are_greedy(params: SamplingParams) -> None:
    logits = random_logits(4, 300)
    logits[3, :2] = -3e38, 3e38
    logits[:, 5] = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(sample(logits, [params] * 4, range(4)), logits.argmax(axis=1))


def test_an_enormous_temperature_is_uniform_over_the_possible_tokens() -> None:
    logits = random_logits(1, 300)
    logits[0, 5] = -np.inf
    weights = token_weights(logits[0], SamplingParams(temperature=1e300))
    assert weights[5] == 0
    assert (np.delete(weights, 5) == 1).all()

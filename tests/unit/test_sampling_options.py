"""Every option that looks at the history: against transformers, in batches, and with drafts."""

from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from trtforge.runtime.request import SamplingParams
from trtforge.runtime.sampling.sampler import INVALID_TOKEN, NO_TOKEN, Sampled, Sampler
from trtforge.runtime.sampling.state import SamplingState, needs_state

VOCAB_SIZE = 40
STOPS = frozenset({3, 7})


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Each option on in about every other request."""

    def maybe(value: object, default: object) -> object:
        return value if rng.integers(2) else default

    biased = rng.choice(VOCAB_SIZE, 5, replace=False).tolist()
    return SamplingParams(
        min_tokens=int(maybe(int(rng.integers(1, 12)), 0)),
        temperature=float(maybe(rng.uniform(0.3, 2), 0.0)),
        top_k=int(maybe(int(rng.integers(1, 30)), 0)),
        top_p=float(maybe(rng.uniform(0.3, 1), 1.0)),
        min_p=float(maybe(rng.uniform(0, 0.2), 0.0)),
        typical_p=float(maybe(rng.uniform(0.3, 1), 1.0)),
        repetition_penalty=float(maybe(rng.uniform(0.5, 2), 1.0)),
        presence_penalty=float(maybe(rng.uniform(-2, 2), 0.0)),
        frequency_penalty=float(maybe(rng.uniform(-2, 2), 0.0)),
        no_repeat_ngram_size=int(maybe(int(rng.integers(2, 4)), 0)),
        logit_bias=tuple(maybe(tuple((token, float(rng.normal() * 3)) for token in biased), ())),
        bad_words_token_ids=tuple(
            tuple(rng.integers(VOCAB_SIZE, size=length).tolist()) for length in maybe((1, 1, 2, 2, 3), ())
        ),
        seed=int(rng.integers(2**63)),
        logprobs=maybe(int(rng.integers(4)), None),
    )


def random_state(rng: np.random.Generator, params: SamplingParams, num_tokens: int = 30) -> SamplingState:
    """A sequence of few different tokens, so that n-grams and bad words occur; some were generated."""
    tokens = rng.integers(6, size=num_tokens).tolist()
    num_prompt_tokens = int(rng.integers(1, num_tokens))
    token_ids = array("i", tokens[:num_prompt_tokens])
    state = SamplingState(params, token_ids, num_prompt_tokens, STOPS)
    for token in tokens[num_prompt_tokens:]:
        token_ids.append(token)
        state.accept(1)
    return state


def random_logits(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    logits = (rng.standard_normal((num_rows, VOCAB_SIZE)) * 2).astype(np.float32)
    logits.flags.writeable = False
    return logits


def processed(logits: np.ndarray, state: SamplingState) -> np.ndarray:
    row = logits.copy()
    for processor in state.processors:
        processor.apply(row, state.history(len(state.token_ids)))
    return row


def expected_logits(logits: np.ndarray, state: SamplingState) -> np.ndarray:
    """By transformers' processors in the order of SamplingParams; what it lacks is written out."""
    params, history = state.params, state.token_ids.tolist()
    input_ids = torch.tensor([history])
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(input_ids, scores)
    for token in range(VOCAB_SIZE):
        count = history[state.num_prompt_tokens :].count(token)
        scores[0, token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    processors = LogitsProcessorList()
    if params.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.bad_words_token_ids:
        words = [list(word) for word in params.bad_words_token_ids]
        processors.append(NoBadWordsLogitsProcessor(words, eos_token_id=sorted(STOPS)))
    if params.min_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(state.num_prompt_tokens, params.min_tokens, sorted(STOPS))
        )
    scores = processors(input_ids, scores)
    for token, bias in params.logit_bias:
        scores[0, token] += bias
    return scores[0].numpy()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.6),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(no_repeat_ngram_size=1),
        SamplingParams(no_repeat_ngram_size=2),
        SamplingParams(no_repeat_ngram_size=3),
        SamplingParams(no_repeat_ngram_size=31),
        SamplingParams(bad_words_token_ids=((3,), (11,), (1, 2), (2, 2), (5, 0, 1), (9,) * 40)),
        SamplingParams(min_tokens=10),
        SamplingParams(logit_bias=((0, 2.5), (39, -4.0), (7, float("-inf")))),
    ],
)
def test_each_option_equals_transformers(params: SamplingParams) -> None:
    rng = np.random.default_rng(1)
    num_changed = 0
    for _ in range(30):
        state = random_state(rng, params)
        (logits,) = random_logits(rng, 1)
        expected = expected_logits(logits, state)
        np.testing.assert_allclose(processed(logits, state), expected, rtol=1e-5, atol=1e-5)
        num_changed += not np.allclose(expected, logits)
    assert num_changed or params.no_repeat_ngram_size == 31


def test_options_together_equal_transformers() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        state = random_state(rng, random_params(rng))
        (logits,) = random_logits(rng, 1)
        np.testing.assert_allclose(
            processed(logits, state), expected_logits(logits, state), rtol=1e-5, atol=1e-5
        )


def sample_alone(logits: np.ndarray, state: SamplingState | None, length: int) -> Sampled:
    return Sampler(VOCAB_SIZE).sample(logits[None], [state], [length])


@pytest.mark.parametrize("with_argmax", [False, True])
def test_batch_mates_and_row_numbers_change_nothing(with_argmax: bool) -> None:
    rng = np.random.default_rng(3)
    states: list[SamplingState | None] = []
    for _ in range(60):
        params = random_params(rng)
        states.append(random_state(rng, params) if rng.integers(4) else None)
    lengths = [len(state.token_ids) if state else 5 for state in states]
    rows = rng.integers(20, size=60).tolist()
    logits = random_logits(rng, 20)
    argmax = logits.argmax(axis=1) if with_argmax else None
    together = Sampler(VOCAB_SIZE).sample(logits, states, lengths, rows, argmax)
    for entry, (state, length, row) in enumerate(zip(states, lengths, rows, strict=True)):
        alone = sample_alone(logits[row], state, length)
        assert alone.token_ids == [together.token_ids[entry]]
        assert together.logprobs is not None
        assert (alone.logprobs or [None]) == [together.logprobs[entry]]


def test_greedy_rows_do_not_touch_the_logits_beside_an_argmax() -> None:
    nothing = np.broadcast_to(np.float32(np.nan), (3, VOCAB_SIZE))
    sampled = Sampler(VOCAB_SIZE).sample(nothing, [None] * 3, [1, 2, 3], argmax=np.array([4, -1, 39]))
    assert sampled == Sampled([4, INVALID_TOKEN, 39])


def generate(logits: np.ndarray, state: SamplingState) -> list[int]:
    """One token from each row, each one fed back."""
    for row in logits:
        (token,) = sample_alone(row, state, len(state.token_ids)).token_ids
        if token < 0:
            break
        state.token_ids.append(token)
        state.accept(1)
    return state.token_ids[state.num_prompt_tokens :].tolist()


def speculate(
    logits: np.ndarray, state: SamplingState, rng: np.random.Generator, hint: list[int]
) -> list[int]:
    """The same rows with up to four drafts a step, most of them right."""
    sampler = Sampler(VOCAB_SIZE)
    while (done := len(state.token_ids) - state.num_prompt_tokens) < len(logits):
        drafts = hint[done : done + int(rng.integers(5))][: len(logits) - done - 1]
        if drafts and rng.integers(2):
            drafts[rng.integers(len(drafts))] = int(rng.integers(VOCAB_SIZE))
        length = len(state.token_ids)
        state.token_ids.extend(drafts)
        num_rows = len(drafts) + 1
        tokens = sampler.sample(
            logits[done : done + num_rows], [state] * num_rows, range(length, length + num_rows)
        ).token_ids
        del state.token_ids[length:]
        num_agreed = next((i for i, draft in enumerate(drafts) if draft != tokens[i]), len(drafts))
        accepted = [token for token in tokens[: num_agreed + 1] if token >= 0]
        state.token_ids.extend(accepted)
        state.accept(len(accepted))
        if len(accepted) <= num_agreed:
            break
    return state.token_ids[state.num_prompt_tokens :].tolist()


def test_speculation_gives_the_tokens_of_one_by_one() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        params = random_params(rng)
        prompt = rng.integers(6, size=int(rng.integers(1, 20))).tolist()
        logits = random_logits(rng, 25)
        one_by_one, speculated = (
            SamplingState(params, array("i", prompt), len(prompt), STOPS) for _ in range(2)
        )
        tokens = generate(logits, one_by_one)
        assert speculate(logits, speculated, rng, tokens) == tokens


def test_forks_are_independent_and_equal_fresh_states() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        params = replace(random_params(rng), temperature=0.8)
        prompt = rng.integers(6, size=8).tolist()
        logits = random_logits(rng, 20)
        first = SamplingState(params, array("i", prompt), 8, STOPS)
        seeds = [params.seed, 11, 12]
        others = [first.fork(array("i", prompt), replace(params, seed=seed)) for seed in seeds]
        answers = [generate(logits, state) for state in (first, *others)]
        fresh = [
            generate(logits, SamplingState(replace(params, seed=seed), array("i", prompt), 8, STOPS))
            for seed in seeds
        ]
        assert answers == [fresh[0], *fresh]
        with pytest.raises(ValueError, match="tokens accepted"):
            first.fork(array("i", prompt), params)


def test_nothing_allowed_ends_the_answer_and_is_not_an_error() -> None:
    everything = tuple((token,) for token in range(VOCAB_SIZE))
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=0, bad_words_token_ids=everything, logprobs=1)
        state = SamplingState(params, array("i", [1]), 1, frozenset())
        (logits,) = random_logits(np.random.default_rng(0), 1)
        assert sample_alone(logits, state, 1) == Sampled([NO_TOKEN])
        assert sample_alone(np.full_like(logits, np.nan), state, 1) == Sampled([INVALID_TOKEN])


def test_penalties_beyond_float32_are_the_largest_numbers() -> None:
    logits = np.array([-3e38, 3e38, 3e38, 0], dtype=np.float32)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=0, repetition_penalty=0.01)
        state = SamplingState(params, array("i", [1]), 1, frozenset())
        assert Sampler(4).sample(logits[None], [state], [1]).token_ids in ([1], [2])


def test_tokens_must_follow_the_accepted_ones() -> None:
    state = SamplingState(SamplingParams(min_tokens=1), array("i", [1, 2]), 2, STOPS)
    for length in (1, 3):
        with pytest.raises(ValueError, match="has to have 2 to 2 tokens"):
            state.history(length)
    state.token_ids.extend([4, 5])
    with pytest.raises(ValueError, match="1 tokens behind 2 accepted ones"):
        state.accept(1)


def test_states_are_needed_for_any_option_but_not_for_ends() -> None:
    assert not needs_state(SamplingParams(max_tokens=3, stop_token_ids=(3,), top_k=4, top_p=0.5, seed=1))
    rng = np.random.default_rng(6)
    for _ in range(50):
        params = random_params(rng)
        on = params.temperature > 0 or params.logprobs is not None
        on |= bool(SamplingState(params, array("i", [1]), 1, STOPS).processors)
        assert needs_state(params) == on

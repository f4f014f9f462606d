"""Arrivals and requests of a load test: distributions, limits, and the same again for the same seed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.client.bench.arrivals import ClosedLoop, OpenLoop, parse_loads
from trtforge.client.bench.lengths import (
    SHAREGPT_INPUT,
    SHAREGPT_OUTPUT,
    LognormalLength,
    UniformLength,
    clip_lengths,
    parse_length,
)
from trtforge.client.bench.workload import BenchRequest, Workload
from trtforge.errors import ConfigError

# --------------------------------------------------------------------------- arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variance_of_the_gamma_distribution(burstiness: float) -> None:
    gaps = np.diff(OpenLoop(5.0, burstiness).arrival_times_s(200_001, seed=3))
    assert gaps.mean() == pytest.approx(0.2, rel=0.02)
    assert gaps.var() == pytest.approx(0.2**2 / burstiness, rel=0.05)


def test_poisson_counts_have_the_variance_of_their_mean() -> None:
    times = OpenLoop(20.0).arrival_times_s(100_000, seed=0)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.mean() == pytest.approx(20, rel=0.02)
    assert counts.var() == pytest.approx(20, rel=0.1)


def test_arrivals_start_at_once_and_repeat_with_the_seed() -> None:
    load = OpenLoop(3.0, 0.5)
    times = load.arrival_times_s(50, seed=7)
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert (times == load.arrival_times_s(50, seed=7)).all()
    assert (times[1:] != load.arrival_times_s(50, seed=8)[1:]).any()
    assert len(load.arrival_times_s(1, seed=0)) == 1


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert (OpenLoop(math.inf).arrival_times_s(4, seed=0) == 0).all()


def test_loads_of_a_command_line() -> None:
    assert parse_loads(None, 1.0, None) == [ClosedLoop(1)]
    assert parse_loads(None, 1.0, "1,2, 8") == [ClosedLoop(1), ClosedLoop(2), ClosedLoop(8)]
    assert parse_loads(2.5, 0.5, None) == [OpenLoop(2.5, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 1.0, "2"), "exclude"),
        ((0.0, 1.0, None), "rate is 0"),
        ((math.nan, 1.0, None), "rate is nan"),
        ((1.0, 0.0, None), "burstiness is 0"),
        ((None, 0.5, "2"), "needs --request-rate"),
        ((None, 1.0, "1,x"), "1,x"),
        ((None, 1.0, "0"), "concurrency is 0"),
    ],
)
def test_wrong_loads_are_named(arguments: tuple[float | None, float, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_loads(*arguments)


# --------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("length", [SHAREGPT_INPUT, SHAREGPT_OUTPUT])
def test_sharegpt_lengths_have_their_published_mean_and_shape(length: LognormalLength) -> None:
    lengths = length.sample(400_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(length.mean, rel=0.02)
    median, p90 = np.percentile(lengths, [50, 90])
    published = {SHAREGPT_INPUT: 5696 / 1730, SHAREGPT_OUTPUT: 834 / 415}[length]
    assert p90 / median == pytest.approx(published, rel=0.02)
    assert lengths.min() >= 1


def test_uniform_lengths_reach_both_ends() -> None:
    assert set(parse_length("3:5").sample(200, np.random.default_rng(0)).tolist()) == {3, 4, 5}
    assert parse_length("7") == UniformLength(7, 7)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "5:3", "1:2:3", "1.5", ":"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_length(text)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 3000))
def test_clipped_lengths_fit_and_keep_what_fitted(num_input: int, num_output: int, limit: int) -> None:
    inputs, outputs = clip_lengths(np.array([num_input]), np.array([num_output]), limit)
    assert inputs[0] >= 1
    assert outputs[0] >= 1
    assert inputs[0] + outputs[0] <= limit
    if num_input + num_output <= limit:
        assert (inputs[0], outputs[0]) == (num_input, num_output)


# --------------------------------------------------------------------------- requests


def make_requests(run: int = 1, **changes: object) -> list[BenchRequest]:
    options: dict[str, object] = {
        "num_requests": 20,
        "seed": 1,
        "input_length": UniformLength(4, 30),
        "output_length": UniformLength(1, 9),
        "vocab_size": 50,
    }
    return Workload(**(options | changes)).requests(run)  # type: ignore[arg-type]


def input_ids(request: BenchRequest) -> list[int]:
    assert request.prompt.input_ids is not None
    return list(request.prompt.input_ids)


def test_requests_repeat_with_the_seed() -> None:
    assert make_requests() == make_requests()
    assert make_requests() != make_requests(seed=2)
    assert [request.index for request in make_requests()] == list(range(20))


def test_runs_differ_in_their_prompts_only() -> None:
    one, two = make_requests(run=1), make_requests(run=2)
    assert [(len(input_ids(r)), r.max_tokens) for r in one] == [
        (len(input_ids(r)), r.max_tokens) for r in two
    ]
    assert all(input_ids(a) != input_ids(b) for a, b in zip(one, two, strict=True))


def test_token_ids_are_below_the_vocabulary_and_lengths_in_their_range() -> None:
    requests = make_requests(num_requests=300)
    assert {token for request in requests for token in input_ids(request)} == set(range(50))
    assert {len(input_ids(request)) for request in requests} == set(range(4, 31))
    assert {request.max_tokens for request in requests} == set(range(1, 10))


def test_a_shared_prefix_comes_before_all_prompts_of_all_runs() -> None:
    requests = make_requests(shared_prefix_tokens=12) + make_requests(run=2, shared_prefix_tokens=12)
    assert len({tuple(input_ids(request)[:12]) for request in requests}) == 1
    assert len({tuple(input_ids(request)[12:]) for request in requests}) == 40
    assert all(16 <= len(input_ids(request)) <= 42 for request in requests)


def test_sharegpt_requests_fit_with_their_prefix() -> None:
    requests = make_requests(
        num_requests=200,
        input_length=SHAREGPT_INPUT,
        output_length=SHAREGPT_OUTPUT,
        max_model_len=256,
        shared_prefix_tokens=56,
    )
    lengths = [len(input_ids(request)) + request.max_tokens for request in requests]
    assert max(lengths) == 256
    with pytest.raises(ConfigError, match="no room"):
        make_requests(input_length=SHAREGPT_INPUT, max_model_len=56, shared_prefix_tokens=56)


def test_text_has_as_many_words_as_ids() -> None:
    for request, as_ids in zip(make_requests(prompt_form="text"), make_requests(), strict=True):
        assert request.prompt.text is not None
        assert len(request.prompt.text.split()) == len(input_ids(as_ids))


def test_a_dataset_is_shuffled_in_whole_rounds(tmp_path: Path) -> None:
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text(
        '{"prompt": "one", "max_tokens": 3}\n\n'
        '{"messages": [{"role": "user", "content": "two"}]}\n'
        '{"input_ids": [3, 4], "max_tokens": 5}\n'
    )
    requests = make_requests(dataset=dataset, num_requests=7, output_length=UniformLength(9, 9))
    assert requests == make_requests(dataset=dataset, num_requests=7, output_length=UniformLength(9, 9))
    for chosen in (requests[:3], requests[3:6]):
        assert sorted(request.max_tokens for request in chosen) == [3, 5, 9]
    (first,) = (request for request in requests[:3] if request.max_tokens == 9)
    assert first.prompt.messages == ({"role": "user", "content": "two"},)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": 1}',
        '{"prompt": "a", "input_ids": [1]}',
        '{"prompt": "a", "max_tokens": 0}',
        '{"prompt": "a", "other": 1}',
    ],
)
def test_a_wrong_line_of_a_dataset_is_named(tmp_path: Path, line: str) -> None:
    dataset = tmp_path / "prompts.jsonl"
    dataset.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ConfigError, match="line 2"):
        make_requests(dataset=dataset)


def test_a_dataset_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        make_requests(dataset=tmp_path / "missing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="no prompts"):
        make_requests(dataset=tmp_path / "empty")

"""Beam search against transformers, with its own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from trtforge.runtime.beam_selection import BeamSelection, Hypothesis

PROMPT = (3, 17, 99, 4)
VOCAB_SIZE = 128


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def search(model: LlamaForCausalLM, selection: BeamSelection, n: int) -> list[Hypothesis]:
    while not selection.is_over:
        rows = torch.tensor([PROMPT + beam.token_ids for beam in selection.running])
        with torch.no_grad():
            logprobs = model(rows).logits[:, -1].log_softmax(-1)
        top = logprobs.topk(selection.num_candidates)
        selection.advance(
            [
                tuple(zip(ids, values, strict=True))
                for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
        )
    return selection.best(n)


@settings(max_examples=12, deadline=None)
@given(
    beam_width=st.integers(2, 6),
    max_tokens=st.integers(1, 10),
    # Many of them, or hardly any beam ends before max_tokens.
    stop_token_ids=st.frozensets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24),
    length_penalty=st.sampled_from([1.0, 0.0, 2.0, -1.0, 0.5]),
    min_tokens=st.sampled_from([0, 0, 3]),
    data=st.data(),
)
def test_answers_and_scores_are_those_of_transformers(
    model: LlamaForCausalLM,
    beam_width: int,
    max_tokens: int,
    stop_token_ids: frozenset[int],
    length_penalty: float,
    min_tokens: int,
    data: st.DataObject,
) -> None:
    n = data.draw(st.integers(1, beam_width))
    min_tokens = min(min_tokens, max_tokens)
    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        num_beams=beam_width,
        num_return_sequences=n,
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        eos_token_id=sorted(stop_token_ids),
        pad_token_id=VOCAB_SIZE - 1,
        length_penalty=length_penalty,
        early_stopping=False,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    selection = BeamSelection(beam_width, max_tokens, stop_token_ids, length_penalty, min_tokens)
    found = search(model, selection, n)
    assert len(found) == n
    for hypothesis, sequence, score in zip(
        found, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
    ):
        token_ids = hypothesis.beam.token_ids
        assert list(token_ids) == sequence[len(PROMPT) :][: len(token_ids)]
        assert hypothesis.score == pytest.approx(score, rel=1e-4)
        assert [entry.token_id for entry in hypothesis.beam.logprobs] == list(token_ids)
        total = sum(entry.logprob for entry in hypothesis.beam.logprobs)
        assert hypothesis.beam.cumulative_logprob == pytest.approx(total)


def test_without_a_stop_token_all_beams_have_max_tokens(model: LlamaForCausalLM) -> None:
    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT)),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=8,
        eos_token_id=None,
        do_sample=False,
    )
    found = search(model, BeamSelection(3, 8, frozenset()), 3)
    assert [list(PROMPT + h.beam.token_ids) for h in found] == expected.tolist()

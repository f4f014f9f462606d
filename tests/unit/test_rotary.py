"""Rotation conventions are recognized from the models' own functions."""

from __future__ import annotations

import importlib

import pytest
import torch

from trtforge.builder.rotary import RotaryConvention, recognize, rotate

NEOX = RotaryConvention(interleaved=False, cos_layout="halves")
EXPECTED = {
    "llama": NEOX,
    "gemma3": NEOX,
    "olmo2": NEOX,
    "phi3": NEOX,
    "gpt_neox": NEOX,
    "cohere": RotaryConvention(interleaved=True, cos_layout="repeated"),
    "glm4": RotaryConvention(interleaved=True, cos_layout="halves"),
    "gpt_oss": RotaryConvention(interleaved=False, cos_layout="single"),
}


def rotary_function(model_type: str):
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    return module.apply_rotary_pos_emb


@pytest.mark.parametrize("model_type", EXPECTED)
def test_convention_of_a_model(model_type: str) -> None:
    assert recognize(rotary_function(model_type)) == EXPECTED[model_type]


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "glm4"])
def test_partial_rotation_leaves_the_rest(model_type: str) -> None:
    convention = EXPECTED[model_type]
    q, k = torch.randn(5, 4, 1, 20), torch.randn(5, 2, 1, 20)
    angles = torch.randn(5, 1, 3)  # 6 of 20 elements turn
    cos, sin = convention.expand(angles.cos()), convention.expand(angles.sin())
    expected = rotary_function(model_type)(q, k, cos, sin)
    assert recognize(rotary_function(model_type), partial=True) == convention
    cos, sin = convention.angles(cos)[:, None], convention.angles(sin)[:, None]
    for x, want in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, cos, sin, interleaved=convention.interleaved), want)


def test_other_functions_are_not_recognized() -> None:
    def backwards(q, k, cos, sin):  # turns in the other direction
        return rotary_function("llama")(q, k, cos, -sin)

    def only_queries(q, k, cos, sin):
        return rotary_function("llama")(q, k, cos, sin)[0], k

    def turns_the_end(q, k, cos, sin):  # a partial rotation of the other elements
        flipped = rotary_function("phi3")(q.flip(-1), k.flip(-1), cos, sin)
        return tuple(x.flip(-1) for x in flipped)

    assert recognize(turns_the_end, partial=True) is None
    for function in (backwards, only_queries, rotary_function("gptj")):
        assert recognize(function) is None

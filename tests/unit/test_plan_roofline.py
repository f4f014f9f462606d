"""Predicted times against bytes and operations counted by hand."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig

from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.planning.capacity import plan_capacity
from trtforge.builder.planning.deployment import Deployment
from trtforge.builder.planning.gpus import GPUS, Compute
from trtforge.builder.planning.model_shape import ModelShape, measure
from trtforge.builder.planning.roofline import Roofline, expected_experts
from trtforge.errors import ConfigError
from trtforge.manifest import Limits

CONFIGS: dict[str, Any] = {
    "llama-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "mixtral-8x7b": MixtralConfig(sliding_window=None),
    "gemma3": Gemma3TextConfig(),
}
LLAMA_MATMULS = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
LLAMA_NORMS = 65 * 4096
LLAMA_HEAD = 128256 * 4096
H200 = GPUS["h200"].compute
assert H200 is not None


@functools.cache
def shape(name: str) -> ModelShape:
    return measure(build_meta_model(CONFIGS[name], torch.bfloat16))


def roofline(name: str = "llama-8b", gpu: str = "h200", compute: Compute = H200, **changes: Any) -> Roofline:
    limits = Limits(max_model_len=131072, max_num_seqs=256, max_num_batched_tokens=2048)
    plan = replace(
        Deployment(GPUS[gpu], 1, 1, "16-bit", "16-bit", limits, 32, 0.9, 1.0),
        **changes,
    )
    model = shape(name)
    return Roofline(model, plan, plan_capacity(model, plan).stages, compute)


def test_one_sequence_decodes_as_fast_as_weights_are_read() -> None:
    time = roofline().decode(1, 1)
    # All weights but the input embedding, of which one row is read, and one token's keys and values, which
    # are written and read.
    nbytes = 2 * (LLAMA_MATMULS + LLAMA_NORMS + LLAMA_HEAD) + 2 * 128 * 2**10
    assert time.seconds == pytest.approx(nbytes / 4.8e12, rel=1e-9)
    assert time.bound == "memory"
    assert time.seconds == pytest.approx(2 * shape("llama-8b").num_parameters / 4.8e12, rel=0.07)


def test_many_sequences_are_bound_by_compute_and_by_their_caches() -> None:
    batch, context_len = 512, 4096
    matmuls_s = 2 * batch * (LLAMA_MATMULS + LLAMA_HEAD) / 989.5e12
    cache_s = batch * (context_len + 1) * 128 * 2**10 / 4.8e12
    assert roofline().decode(batch, context_len).seconds == pytest.approx(matmuls_s + cache_s, rel=1e-9)


def test_prefill_counts_every_pair_of_tokens_once() -> None:
    prompt_len = 5000  # three chunks
    pairs = sum(position + 1 for position in range(prompt_len))
    matmuls_s = 2 * prompt_len * LLAMA_MATMULS / 989.5e12
    attention_s = 4 * 32 * 128 * 32 * pairs / 989.5e12
    head_s = 2 * LLAMA_HEAD / 4.8e12  # one row of logits: its weights are read
    assert roofline().prefill(prompt_len).seconds == pytest.approx(matmuls_s + attention_s + head_s, rel=1e-9)


@pytest.mark.parametrize("prompt_len", [1, 700, 2048, 2049, 5000])
def test_windows_bound_what_layers_compute(prompt_len: int) -> None:
    slow = replace(H200, flops_16bit=1.0, bandwidth_bytes_per_s=1e30)  # seconds are operations
    model = shape("gemma3")
    pairs = sum(
        min(position + 1, layer.cache.window or prompt_len)
        for layer in model.layers
        for position in range(prompt_len)
    )
    dense = sum(m.out_features * m.in_features for layer in model.layers for m in layer.matmuls)
    expected = 4 * 8 * 256 * pairs + 2 * prompt_len * dense + 2 * model.vocab_size * model.hidden_size
    assert roofline("gemma3", compute=slow).prefill(prompt_len).seconds == pytest.approx(expected, rel=1e-9)


def test_windows_bound_what_layers_read() -> None:
    short, long = (roofline("gemma3").decode(1, length).memory_s for length in (4096, 32768))
    per_layer = 2 * 4 * 256 * 2
    assert (long - short) * 4.8e12 == pytest.approx(4 * (32768 - 4096) * per_layer, rel=1e-6)


def test_one_token_reads_two_of_eight_experts() -> None:
    """Mixtral is published with 12.9 billion active parameters."""
    active = roofline("mixtral-8x7b").decode(1, 1).seconds * 4.8e12 / 2
    assert active + 32000 * 4096 == pytest.approx(12.9e9, rel=2e-3)


def test_expected_experts_against_all_choices() -> None:
    copies, active, num_tokens = 5, 2, 3
    subsets = list(itertools.combinations(range(copies), active))
    sizes = [len(set().union(*choice)) for choice in itertools.product(subsets, repeat=num_tokens)]
    assert expected_experts(copies, active, num_tokens) == pytest.approx(sum(sizes) / len(sizes))
    assert expected_experts(1, 1, 7) == 1


def test_links_carry_sums_and_logits() -> None:
    tp, batch = 4, 16
    state_bytes = batch * 4096 * 2
    nbytes = 65 * 2 * 3 / 4 * state_bytes + 3 / 4 * batch * 128256 * 4
    assert roofline(tp=tp).decode(batch, 1024).link_s == pytest.approx(nbytes / 450e9)
    assert roofline().decode(batch, 1024).link_s == 0
    assert roofline(pp=2).decode(batch, 1024).link_s == pytest.approx(state_bytes / 450e9)
    halves = roofline(tp=2).decode(1, 1024)
    assert halves.memory_s == pytest.approx(roofline().decode(1, 1024).memory_s / 2, rel=1e-4)


def test_a_pipeline_is_no_faster_for_one_batch() -> None:
    whole, staged = roofline().decode(8, 1024), roofline(pp=4).decode(8, 1024)
    assert staged.seconds - staged.link_s == pytest.approx(whole.seconds)


@pytest.mark.parametrize(
    ("weights", "batch"),
    [
        ("16-bit", 989.5 / 4.8),  # operations a byte, two for each number of two bytes
        ("fp8-weight-only", 989.5 / 4.8 / 2),
        ("fp8", 989.5 / 4.8),
    ],
)
def test_the_ridge_is_where_a_weight_takes_as_long_to_use_as_to_read(weights: Any, batch: float) -> None:
    # The output embedding in 16 bit and the norms move it a little.
    assert roofline(weights=weights).ridge_batch() == pytest.approx(batch, rel=0.08)


def test_the_ridge_is_the_first_batch_of_its_kind() -> None:
    model = roofline("mixtral-8x7b")
    ridge = model.ridge_batch()
    assert ridge is not None
    below, at = (model.decode(batch, 1) for batch in (ridge - 1, ridge))
    assert below.bound == "memory"
    assert at.compute_s > 0
    assert roofline().ridge_batch(limit=64) is None


def test_fp8_matmuls_take_half_the_time_of_16_bit_ones() -> None:
    one, other = (roofline(weights=weights).prefill(2048).compute_s for weights in ("16-bit", "fp8"))
    attention_s = 4 * 32 * 128 * 32 * (2048 * 2049 // 2) / 989.5e12  # stays in 16 bit
    assert other - attention_s == pytest.approx((one - attention_s) / 2, rel=1e-6)


def test_fp8_matmuls_need_fp8_units() -> None:
    a100 = GPUS["a100-80gb"].compute
    assert a100 is not None
    with pytest.raises(ConfigError, match="no FP8"):
        roofline(gpu="a100-80gb", compute=a100, weights="fp8")
    assert roofline(gpu="a100-80gb", compute=a100, weights="fp8-weight-only").decode(1, 1).seconds > 0


batches = st.integers(1, 4096)


@given(
    st.sampled_from(["llama-8b", "mixtral-8x7b", "gemma3"]),
    st.sampled_from([1, 2, 8]),
    batches,
    batches,
    st.integers(1, 131072),
    st.integers(1, 131072),
)
def test_prediction_is_monotone(name: str, tp: int, one: int, other: int, first: int, second: int) -> None:
    model = roofline(name, tp=tp)
    few, many = sorted((one, other))
    short, long = sorted((first, second))
    slack = 1 + 1e-9
    assert model.decode(few, short).seconds <= model.decode(many, short).seconds * slack
    assert model.decode(few, short).seconds <= model.decode(few, long).seconds * slack
    # A larger batch never lowers throughput.
    assert few / model.decode(few, short).seconds <= many / model.decode(many, short).seconds * slack
    half = roofline(name, tp=tp, efficiency=0.5).decode(few, long)
    assert half.seconds == pytest.approx(2 * model.decode(few, long).seconds)


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_longer_prompts_take_longer(one: int, other: int) -> None:
    short, long = sorted((one, other))
    assert roofline("gemma3").prefill(short).seconds <= roofline("gemma3").prefill(long).seconds * (1 + 1e-9)

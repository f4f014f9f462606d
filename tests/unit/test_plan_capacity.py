"""Planned memory against published figures, arithmetic on paper, and what must hold for any model."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
)

from trtforge.builder.meta_model import build_meta_model
from trtforge.builder.planning.advice import remarks, remedies
from trtforge.builder.planning.capacity import plan_capacity
from trtforge.builder.planning.deployment import Deployment, KVFormatName, WeightFormatName
from trtforge.builder.planning.gpus import FP8_CAPABILITY, GPUS
from trtforge.builder.planning.model_shape import Layer, Matmul, ModelShape, measure
from trtforge.builder.planning.ranks import rank_heads
from trtforge.errors import ConfigError
from trtforge.manifest import LayerCache, Limits

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
CONFIGS: dict[str, Any] = {
    "llama-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
    ),
    "llama-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
    "llama-405b": LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **LLAMA
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "mixtral-8x7b": MixtralConfig(sliding_window=None),
    "gpt-oss-120b": GptOssConfig(),
    "deepseek-v3": DeepseekV3Config(),
    "mistral-7b": MistralConfig(sliding_window=4096),
    "gemma3": Gemma3TextConfig(),
    "gpt2": GPT2Config(),
    "opt-125m": OPTConfig(),
    "phi3-mini": Phi3Config(sliding_window=None),
}


@functools.cache
def shape(name: str) -> ModelShape:
    return measure(build_meta_model(CONFIGS[name], torch.bfloat16))


def deployment(
    gpu: str = "h200",
    tp: int = 1,
    pp: int = 1,
    weights: WeightFormatName = "16-bit",
    kv_cache: KVFormatName = "16-bit",
    max_model_len: int = 8192,
) -> Deployment:
    limits = Limits(max_model_len=max_model_len, max_num_seqs=256, max_num_batched_tokens=2048)
    return Deployment(GPUS[gpu], tp, pp, weights, kv_cache, limits, 32, 0.9, 1.0)


# ------------------------------------------------------------------ published figures


@pytest.mark.parametrize(
    ("name", "num_parameters", "gigabytes"),
    [
        ("llama-8b", 8_030_261_248, 16.06),
        ("llama-70b", 70_553_706_496, 141.1),
        ("llama-405b", 405_853_388_800, 811.7),
        ("mixtral-8x7b", 46_702_792_704, 93.4),
        ("gpt-oss-120b", 116_829_156_672, 233.7),  # in bfloat16, not as it is published
        ("deepseek-v3", 671_026_404_352, 1342.1),
    ],
)
def test_weights_in_bfloat16(name: str, num_parameters: int, gigabytes: float) -> None:
    model = shape(name)
    assert model.num_parameters == num_parameters
    (stage,) = plan_capacity(model, deployment()).stages
    # Some models keep a few parameters in float32, such as the routers' corrections of DeepSeek.
    assert stage.weight_bytes == pytest.approx(2 * num_parameters, rel=1e-6)
    assert stage.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=5e-4)


def test_kv_cache_of_llama_70b() -> None:
    capacity = plan_capacity(shape("llama-70b"), deployment())
    (stage,) = capacity.stages
    assert stage.kv_bytes_per_token == 320 * 2**10
    for batch in (1, 2, 4, 8, 16, 32):
        assert batch * 4096 * stage.kv_bytes_per_token == batch * 1.25 * 2**30
    assert capacity.sequence_blocks(4096) * capacity.block_size == 4096


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_a_cache_of_eight_bits_holds_twice_as_much(kv_cache: KVFormatName) -> None:
    model = shape("llama-8b")
    one = plan_capacity(model, deployment())
    other = plan_capacity(model, deployment(kv_cache=kv_cache))
    assert 2 * other.stages[0].kv_bytes_per_token == one.stages[0].kv_bytes_per_token
    assert other.num_blocks // 2 == one.num_blocks


# ------------------------------------------------------------------ arithmetic

ROWS_70B = 80 * (8192 + 2 * 1024 + 8192 + 2 * 28672 + 8192)
NUMBERS_70B = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
REST_70B = 2 * (2 * 128256 * 8192 + 161 * 8192)  # embeddings and norms


@pytest.mark.parametrize(
    ("weights", "nbytes"),
    [
        ("fp8", NUMBERS_70B + 4 * ROWS_70B + REST_70B),
        ("fp8-weight-only", NUMBERS_70B + 4 * ROWS_70B + REST_70B),
        ("int4", NUMBERS_70B // 2 + 4 * NUMBERS_70B // 128 + REST_70B),
    ],
)
def test_quantized_weights(weights: WeightFormatName, nbytes: int) -> None:
    (stage,) = plan_capacity(shape("llama-70b"), deployment(weights=weights)).stages
    assert stage.weight_bytes == nbytes


def test_int4_takes_smaller_groups_where_others_do_not_divide() -> None:
    (stage,) = plan_capacity(shape("smollm2-135m"), deployment(weights="int4")).stages
    # q, k, v, o, gate and up have 576 inputs: nine groups of 64, in memory padded to 640.
    from_hidden = 30 * (576 + 2 * 192 + 576 + 2 * 1536)
    down = 30 * 576
    data_bytes = (from_hidden * 640 + down * 1536) // 2
    scales_bytes = 4 * (from_hidden * 9 + down * 12)
    assert stage.weight_bytes == data_bytes + scales_bytes + 2 * (49152 * 576 + 61 * 576)


def test_int4_of_experts_is_not_padded() -> None:
    (stage,) = plan_capacity(shape("gpt-oss-120b"), deployment(weights="int4")).stages
    experts = sum(
        count * weight.copies * weight.nbytes for weight, count in stage.weights if weight.copies > 1
    )
    rows = 36 * 128 * (2 * 2880 + 2880)
    assert experts == rows * 2880 // 2 + 4 * rows * 45  # groups of 64


@pytest.mark.parametrize(
    "name", ["llama-8b", "mixtral-8x7b", "gpt-oss-120b", "gpt2", "opt-125m", "phi3-mini", "deepseek-v3"]
)
def test_two_ranks_have_half_of_the_matmuls_each(name: str) -> None:
    """Whatever the model calls its projections, and whether they are fused."""
    model = shape(name)
    (whole,) = plan_capacity(model, deployment()).stages
    (half,) = plan_capacity(model, deployment(tp=2)).stages
    latent = 61 * (1536 + 576) * 7168 * 2 if name == "deepseek-v3" else 0  # all heads share it
    shared = whole.weight_bytes - whole.other_bytes - latent
    rounding = 2 * model.hidden_size  # of an odd vocabulary
    assert half.weight_bytes - half.other_bytes - latent == pytest.approx(shared / 2, abs=rounding)
    assert 2 * half.kv_bytes_per_token == whole.kv_bytes_per_token


def test_heads_that_do_not_divide() -> None:
    model = shape("smollm2-135m")
    (stage,) = plan_capacity(model, deployment(tp=2)).stages
    assert stage.kv_bytes_per_token == 30 * 2 * 2 * 64 * 2  # two of three KV heads
    assert any("6 of 9 query heads" in remark for remark in _remarks(model, deployment(tp=2)))


def test_kv_heads_are_replicated_where_ranks_outnumber_them() -> None:
    model = shape("llama-70b")
    sizes = {
        tp: plan_capacity(model, deployment(tp=tp)).stages[0].kv_bytes_per_token for tp in (4, 8, 16, 64)
    }
    assert sizes == {4: 80 * 2**10, 8: 40 * 2**10, 16: 40 * 2**10, 64: 40 * 2**10}
    assert any("KV heads are replicated" in remark for remark in _remarks(model, deployment(tp=16)))
    assert not _remarks(model, deployment(tp=8))


def test_pipeline_stages() -> None:
    model = shape("llama-70b")
    capacity = plan_capacity(model, deployment(pp=3))
    assert [stage.num_layers for stage in capacity.stages] == [27, 27, 26]
    assert sum(stage.weight_bytes for stage in capacity.stages) == 2 * model.num_parameters
    assert sum(stage.kv_bytes_per_token for stage in capacity.stages) == 320 * 2**10
    table, last_norm = 2 * 128256 * 8192, 2 * 8192
    first, middle, last = (stage.weight_bytes for stage in capacity.stages)
    assert first == middle + table
    assert last == middle // 27 * 26 + last_norm + table


def test_a_tied_embedding_is_there_once_but_on_both_ends_of_a_pipeline() -> None:
    model = shape("smollm2-135m")
    (one,) = plan_capacity(model, deployment()).stages
    two = plan_capacity(model, deployment(pp=2)).stages
    assert one.weight_bytes == 2 * model.num_parameters
    assert sum(stage.weight_bytes for stage in two) == 2 * model.num_parameters + 2 * 49152 * 576


def test_windows() -> None:
    sliding = plan_capacity(shape("mistral-7b"), deployment(max_model_len=32768))
    assert sliding.sequence_blocks(4000) == 125
    assert sliding.sequence_blocks(32768) == 4096 // 32 + 1
    mixed = plan_capacity(shape("gemma3"), deployment(max_model_len=32768))
    assert mixed.sequence_blocks(32768) == 1024
    (remark,) = _remarks(shape("gemma3"), deployment(max_model_len=32768))
    per_layer = 2 * 4 * 256 * 2
    assert f"{26 * 32768 * per_layer / 2**20:,.0f} MiB for" in remark
    assert f"{(4 * 32768 + 22 * 4096) * per_layer / 2**20:,.0f} MiB are read" in remark


def _remarks(model: ModelShape, plan: Deployment) -> list[str]:
    return remarks(model, plan, plan_capacity(model, plan))


# ------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(("changes", "option"), [({"tp": 10}, "--tp 10"), ({"pp": 31}, "--pp 31")])
def test_ranks_that_would_have_nothing(changes: dict[str, int], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        plan_capacity(shape("smollm2-135m"), deployment(**changes))


def test_every_remedy_works_and_smaller_ones_do_not() -> None:
    model = shape("llama-70b")
    plan = deployment("h100", max_model_len=32768)
    assert not plan_capacity(model, plan).fits
    assert remedies(model, plan) == ["--int4", "--tp 2"]
    for changes, fits in (({"weights": "int4"}, True), ({"tp": 2}, True), ({"weights": "fp8"}, False)):
        assert plan_capacity(model, replace(plan, **changes)).fits == fits
    assert remedies(model, deployment("h100", max_model_len=131072)) == ["--tp 4"]


def test_a_sequence_that_is_too_long() -> None:
    model = shape("llama-8b")
    plan = deployment("rtx4090", max_model_len=100_000)
    options = remedies(model, plan)
    longest = int(options[0].removeprefix("--max-model-len "))
    fits = [
        plan_capacity(model, deployment("rtx4090", max_model_len=length)).fits
        for length in (longest, longest + 1)
    ]
    assert fits == [True, False]
    assert options[1:] == ["--kv-cache-dtype fp8", "--fp8", "--int4", "--tp 2"]


def test_what_takes_two_changes() -> None:
    plan = deployment("a100-80gb")
    assert remedies(shape("llama-405b"), plan) == ["--fp8 --tp 8", "--int4 --tp 4"]
    assert remedies(shape("deepseek-v3"), deployment("rtx4090")) == []
    assert remedies(shape("llama-8b"), plan) == []


def test_gpus_are_consistent() -> None:
    for name, gpu in GPUS.items():
        if gpu.compute is None:
            continue
        assert (gpu.compute.flops_fp8 is not None) == (gpu.compute.capability >= FP8_CAPABILITY), name
        if gpu.compute.flops_fp8 is not None:  # dense rates double with half the bits
            assert gpu.compute.flops_fp8 == pytest.approx(2 * gpu.compute.flops_16bit, rel=0.02), name


# ------------------------------------------------------------------ any model


@st.composite
def models(draw: st.DrawFn) -> ModelShape:
    """Models like Llama, with any numbers of heads and features, some with experts or windows."""
    num_kv_heads = draw(st.integers(1, 6))
    num_heads = num_kv_heads * draw(st.integers(1, 6))
    dim = draw(st.sampled_from([32, 64, 80, 128]))
    hidden, inner = 32 * draw(st.integers(1, 20)), 32 * draw(st.integers(1, 20))
    num_experts = draw(st.sampled_from([1, 1, 8]))
    experts = {"copies": num_experts, "active": min(num_experts, 2)}
    matmuls = (
        Matmul(num_heads * dim, hidden, 2, "out", per_head=dim),
        Matmul(2 * num_kv_heads * dim, hidden, 2, "out", per_kv_head=2 * dim),
        Matmul(hidden, num_heads * dim, 2, "in", per_head=dim),
        Matmul(2 * inner, hidden, 2, "out", parts=2, **experts),
        Matmul(hidden, inner, 2, "in", **experts),
    )
    window = draw(st.sampled_from([0, 0, 64]))
    layer = Layer(num_heads, LayerCache(num_kv_heads=num_kv_heads, head_dim=dim, window=window), matmuls, 64)
    vocab_size = draw(st.integers(1, 3000))
    table_bytes = vocab_size * hidden * 2
    layers = (layer,) * draw(st.integers(1, 4))
    return ModelShape("Any", 1, hidden, vocab_size, layers, table_bytes, table_bytes, draw(st.booleans()), 64)


formats = st.sampled_from(["16-bit", "fp8", "fp8-weight-only", "int4"])


def rank_features(matmul: Matmul) -> int:
    """Those that ranks divide among them."""
    return (matmul.out_features if matmul.sharded == "out" else matmul.in_features) // matmul.parts


@given(models(), formats, st.integers(1, 36), st.integers(1, 36))
def test_more_ranks_never_need_more_memory(
    model: ModelShape, weights: WeightFormatName, one: int, other: int
) -> None:
    few, many = sorted((one, other))
    assume(many <= model.layers[0].num_heads)
    # Fewer features than ranks are not divided.
    assume(all(rank_features(matmul) >= many for matmul in model.layers[0].matmuls))
    plans = [plan_capacity(model, deployment(tp=tp, weights=weights)) for tp in (few, many)]
    assert plans[0].stages[0].weight_bytes >= plans[1].stages[0].weight_bytes
    assert plans[0].stages[0].kv_bytes_per_token >= plans[1].stages[0].kv_bytes_per_token
    assert plans[0].activation_bytes >= plans[1].activation_bytes
    assert plans[0].num_blocks <= plans[1].num_blocks


@given(models(), formats, st.integers(1, 36))
def test_all_ranks_together_have_the_whole_model(
    model: ModelShape, weights: WeightFormatName, tp: int
) -> None:
    assume(tp <= model.layers[0].num_heads)
    (whole,) = plan_capacity(model, deployment(weights=weights)).stages
    (part,) = plan_capacity(model, deployment(tp=tp, weights=weights)).stages
    assert tp * part.weight_bytes >= whole.weight_bytes
    assert tp * part.kv_bytes_per_token >= whole.kv_bytes_per_token


@given(models(), st.integers(1, 500), st.integers(1, 500))
def test_longer_sequences_never_fit_more_often(model: ModelShape, one: int, other: int) -> None:
    capacity = plan_capacity(model, deployment("rtx4090"))
    short, long = sorted((one, other))
    assert capacity.num_sequences(short) >= capacity.num_sequences(long)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 64))
def test_the_largest_rank_has_what_dealing_out_heads_gives_it(
    num_kv_heads: int, per_kv_head: int, tp: int
) -> None:
    num_heads = num_kv_heads * per_kv_head
    assume(tp <= num_heads)
    if tp <= num_kv_heads:
        dealt = [len(range(rank, num_kv_heads, tp)) for rank in range(tp)]
        expected = (max(dealt) * per_kv_head, max(dealt))
    else:
        sharers = [len(range(head, tp, num_kv_heads)) for head in range(num_kv_heads)]
        expected = (max(math.ceil(per_kv_head / count) for count in sharers), 1)
    assert rank_heads(num_heads, num_kv_heads, tp) == expected

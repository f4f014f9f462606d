from __future__ import annotations

import pytest

from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.manifest import KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo
from trtforge.runtime.executors.memory_budget import MemoryBudget, plan_memory

# Llama 3.1 8B: 131,072 bytes of keys and values a token in 16 bits.
LAYERS = (LayerCache(num_kv_heads=8, head_dim=128),) * 32
BLOCK_BYTES = 131_072 * 16
AVAILABLE = 80 * 2**30


def plan(**options: object) -> MemoryBudget:
    manifest = Manifest(
        trtforge_version="0",
        build_key="",
        runtime="fake",
        dtype="bfloat16",
        model=ModelInfo(name="m", architecture="", vocab_size=1, num_parameters=1, eos_token_ids=()),
        kv_cache=KVCacheLayout(dtype="bfloat16", block_size=16, num_blocks=1000, layers=LAYERS),
        limits=Limits(max_model_len=1, max_num_seqs=1, max_num_batched_tokens=1),
        ranks=(),
        files={"rank0/model.safetensors": 16 * 2**30, "tokenizer/tokenizer.json": 5},
    )
    return plan_memory(manifest, EngineOptions.model_validate(options), AVAILABLE)


@pytest.mark.parametrize(
    ("options", "num_blocks"),
    [
        ({}, 1000),
        ({"kv_cache_bytes": 10 * BLOCK_BYTES + 1}, 10),
        ({"kv_cache_fraction": 0.5}, 40 * 2**30 // BLOCK_BYTES),
        ({"kv_cache_fraction": 0.5, "kv_cache_bytes": 7 * BLOCK_BYTES}, 7),
        ({"kv_cache_fraction": 0.0001, "kv_cache_bytes": 7 * BLOCK_BYTES}, 4),
    ],
)
def test_the_cache_is_what_was_built_or_what_cap_and_fraction_allow(
    options: dict[str, object], num_blocks: int
) -> None:
    assert plan(**options).num_blocks == num_blocks


def test_the_budget_is_readable() -> None:
    text = str(plan(preemption_mode="swap", swap_bytes=2**30))
    for line in (
        "  free memory     81,920.0 MiB",
        "  weights         16,384.0 MiB",
        "  KV cache         2,000.0 MiB  1,000 blocks of 16 tokens",
        "  swap space       1,024.0 MiB  512 blocks",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_bytes": BLOCK_BYTES - 1}, "make 0 blocks of 2097152 bytes"),
        ({"kv_cache_bytes": 2**60}, "allowed are 1 to 134217727"),
        ({"preemption_mode": "swap"}, "swap_bytes 0 holds no block of 2097152 bytes"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**options)

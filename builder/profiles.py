"""Which sizes an engine is made for: its optimization profiles."""

from __future__ import annotations

from trtforge.builder.plan import blocks_per_sequence
from trtforge.manifest import MAX_SLOTS, DimRange, KVCacheLayout, Limits, Profile

# Sizes that kernels are chosen for, where the range allows it.
_TYPICAL_SEQS = 8
_TYPICAL_TOKENS = 512


def make_profiles(package: str, limits: Limits, kv_cache: KVCacheLayout) -> tuple[Profile, ...]:
    """The profiles of an engine that `package` builds.

    TensorRT chooses kernels for each profile when it builds: decode steps get their own. TensorRT-RTX
    compiles for the shapes that it meets when it runs, and a second profile doubles the time of a build.
    """
    mixed = _mixed_profile(limits, kv_cache)
    return (mixed,) if package == "tensorrt_rtx" else (_decode_profile(limits, kv_cache), mixed)


def _mixed_profile(limits: Limits, kv_cache: KVCacheLayout) -> Profile:
    """Every step that the limits allow: tokens up to the budget, of prefill and decode together."""
    return _profile("mixed", limits, kv_cache, limits.max_num_batched_tokens, _TYPICAL_TOKENS)


def _decode_profile(limits: Limits, kv_cache: KVCacheLayout) -> Profile:
    """Steps with one token a sequence."""
    return _profile("decode", limits, kv_cache, limits.max_num_seqs, _TYPICAL_SEQS)


def _profile(name: str, limits: Limits, kv_cache: KVCacheLayout, max_tokens: int, tokens: int) -> Profile:
    longest = blocks_per_sequence(limits.max_model_len, kv_cache.block_size)
    num_seqs = DimRange(min=1, opt=min(_TYPICAL_SEQS, limits.max_num_seqs), max=limits.max_num_seqs)
    return Profile(
        name=name,
        dims={
            "T": DimRange(min=1, opt=min(tokens, max_tokens), max=max_tokens),
            "B": num_seqs,
            "B_plus_1": DimRange(min=num_seqs.min + 1, opt=num_seqs.opt + 1, max=num_seqs.max + 1),
            # Prompts whose log probabilities are wanted need the logits of all of their tokens.
            "R": DimRange(min=1, opt=min(num_seqs.opt, max_tokens), max=max_tokens),
            "max_blocks": DimRange(min=1, opt=max(1, longest // 4), max=longest),
            # The cache's size is decided when a model is loaded, by the memory that is free then.
            "num_blocks": DimRange(min=1, opt=kv_cache.num_blocks, max=MAX_SLOTS // kv_cache.block_size),
        },
    )

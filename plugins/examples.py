"""Calls of known models, to compile kernels for without building a model."""

from __future__ import annotations

from collections.abc import Mapping

from trtforge.plugins.fp8_gemm.op import FP8_GEMM, scale_shape
from trtforge.plugins.int4_gemm.op import INT4_GEMM, packed_shape
from trtforge.plugins.launch import Call
from trtforge.plugins.op import OpSpec
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

GROUP_SIZE = 128  # input features that share a scale of a 4-bit weight


def attention_call(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, cache: str) -> Call:
    """Of PagedAttention with bfloat16 queries; a cache of e4m3 has scales."""
    shapes: dict[str, tuple[int, ...]] = {
        "q": (-1, num_heads, head_dim),
        "k": (-1, num_kv_heads, head_dim),
        "v": (-1, num_kv_heads, head_dim),
        "kv_cache": (-1, 2, block_size, num_kv_heads, head_dim),
        "block_tables": (-1, -1),
        "cu_seqlens": (-1,),
        "context_lens": (-1,),
        "slot_mapping": (-1,),
    }
    dtypes = dict.fromkeys(shapes, "int32") | dict.fromkeys(("q", "k", "v"), "bfloat16")
    dtypes["kv_cache"] = cache
    if cache == "float8_e4m3fn":
        shapes |= {"k_scale": (1,), "v_scale": (1,)}
        dtypes |= {"k_scale": "float32", "v_scale": "float32"}
    return Call(shapes, dtypes, {"scale": head_dim**-0.5, "window": 0, "softcap": 0.0})


def int4_call(out_features: int, in_features: int) -> Call:
    """Of Int4Gemm with groups of GROUP_SIZE."""
    return Call(
        shapes={
            "x": (-1, in_features),
            "weight": packed_shape(out_features, in_features),
            "scales": (in_features // GROUP_SIZE, out_features, 2),
        },
        dtypes={"x": "bfloat16", "weight": "int32", "scales": "bfloat16"},
        attributes={},
    )


def fp8_call(out_features: int, in_features: int, activation: str) -> Call:
    """Of Fp8Gemm with a scale for each output."""
    return Call(
        shapes={
            "x": (-1, in_features),
            "weight": (out_features, in_features),
            "scale": scale_shape("channel", out_features, in_features),
        },
        dtypes={"x": "bfloat16", "weight": "float8_e4m3fn", "scale": "float32"},
        attributes={"scales": "channel", "activation": activation},
    )


def _llama_8b() -> tuple[tuple[OpSpec, Call], ...]:
    """32 heads and 8 KV heads of 128, hidden size 4096, MLP 14336; blocks of 32 tokens.

    With caches of 16 and of 8 bits, and weights of 4 and of 8 bits, the latter also with activations of 8.
    """
    weights = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    caches = ("bfloat16", "float8_e4m3fn")
    return (
        *((PAGED_ATTENTION, attention_call(32, 8, 128, block_size=32, cache=cache)) for cache in caches),
        *((INT4_GEMM, int4_call(*weight)) for weight in weights),
        *(
            (FP8_GEMM, fp8_call(*weight, activation))
            for weight in weights
            for activation in ("none", "dynamic")
        ),
    )


# Name -> the different calls of its graphs, with their operators' names. Activations are bfloat16.
EXAMPLES: Mapping[str, tuple[tuple[str, Call], ...]] = {
    "llama-8b": tuple((spec.name, call) for spec, call in _llama_8b()),
}

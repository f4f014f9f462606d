"""Calls of known models, to compile kernels for without building a model."""

from __future__ import annotations

from collections.abc import Mapping

from trtforge.plugins.launch import Call


def _attention(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, cache: str) -> Call:
    shapes = {
        "q": (-1, num_heads, head_dim),
        "k": (-1, num_kv_heads, head_dim),
        "v": (-1, num_kv_heads, head_dim),
        "kv_cache": (-1, 2, block_size, num_kv_heads, head_dim),
        "block_tables": (-1, -1),
        "cu_seqlens": (-1,),
        "context_lens": (-1,),
        "slot_mapping": (-1,),
    }
    dtypes = dict.fromkeys(("q", "k", "v"), "bfloat16") | {"kv_cache": cache}
    dtypes |= dict.fromkeys(("block_tables", "cu_seqlens", "context_lens", "slot_mapping"), "int32")
    return Call(shapes, dtypes, {"scale": head_dim**-0.5, "window": 0, "softcap": 0.0})


# Name -> the different calls of its graph, with their operators' names. Weights and queries are bfloat16.
EXAMPLES: Mapping[str, tuple[tuple[str, Call], ...]] = {
    # Llama 3.1 8B: 32 heads and 8 KV heads of 128, hidden size 4096, MLP 14336.
    "llama-8b": (("PagedAttention", _attention(32, 8, 128, block_size=32, cache="bfloat16")),),
}

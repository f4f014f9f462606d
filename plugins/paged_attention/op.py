"""PagedAttention: append this step's keys and values to the paged cache, then attend through it."""

from __future__ import annotations

from trtforge.plugins.op import FLOATS, INTS, Attribute, OpSpec, Tensor

PAGED_ATTENTION = OpSpec(
    name="PagedAttention",
    doc=(
        "Causal attention of packed queries over a paged key/value cache. The new keys and values are "
        "stored first, so that a token sees itself. kv_cache_out is kv_cache after the step; runtimes bind "
        "both to the same memory."
    ),
    inputs=(
        Tensor("q", "T", ("num_tokens", "num_heads", "head_dim")),
        Tensor("k", "T", ("num_tokens", "num_kv_heads", "head_dim")),
        Tensor("v", "T", ("num_tokens", "num_kv_heads", "head_dim")),
        Tensor("kv_cache", "KV", ("num_blocks", 2, "block_size", "num_kv_heads", "head_dim")),
        Tensor("block_tables", "I", ("num_seqs", "max_blocks")),
        Tensor("cu_seqlens", "I", ("num_seqs + 1",)),
        Tensor("context_lens", "I", ("num_seqs",)),
        Tensor("slot_mapping", "I", ("num_tokens",)),
        Tensor("sinks", "T", ("num_heads",), optional=True),
        # Added to a score: slope * (position of the key - position of the query).
        Tensor("alibi_slopes", "F", ("num_heads",), optional=True),
        # What a stored 1 stands for; 1 where it is left out.
        Tensor("k_scale", "F", (1,), optional=True),
        Tensor("v_scale", "F", (1,), optional=True),
    ),
    outputs=(
        Tensor("out", "T", ("num_tokens", "num_heads", "head_dim")),
        Tensor("kv_cache_out", "KV", ("num_blocks", 2, "block_size", "num_kv_heads", "head_dim")),
    ),
    dtypes={
        "T": FLOATS,
        "KV": (*FLOATS, "tensor(float8e4m3fn)", "tensor(int8)"),
        "I": INTS,
        "F": ("tensor(float)",),
    },
    attributes=(
        Attribute("scale", "float"),
        Attribute("window", "int", 0),  # tokens that a token sees, itself included; 0: all before it
        Attribute("softcap", "float", 0.0),  # c * tanh(score / c); 0: off
    ),
    aliases={"kv_cache_out": "kv_cache"},
)

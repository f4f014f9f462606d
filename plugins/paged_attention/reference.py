"""PagedAttention, slow and obvious."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trtforge.plugins.op import Array
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

E4M3_MAX = 448.0


def paged_attention(
    q: Array,  # [T, H, D]
    k: Array,  # [T, Hkv, D]
    v: Array,  # [T, Hkv, D]
    kv_cache: Array,  # [num_blocks, 2, block_size, Hkv, D]
    block_tables: Array,  # [B, max_blocks]
    cu_seqlens: Array,  # [B + 1]
    context_lens: Array,  # [B]
    slot_mapping: Array,  # [T]
    sinks: Array | None = None,  # [H]
    alibi_slopes: Array | None = None,  # [H]
    k_scale: Array | None = None,  # [1]
    v_scale: Array | None = None,  # [1]
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Array, Array]:
    """(out [T, H, D], the cache after the step); no input is changed. Scores are float32.

    Rows of `out` that belong to no sequence are zero. Raises PluginError for shapes that do not fit.
    Source: PagedAttention (arXiv 2309.06180); sinks as in gpt-oss, softcap as in Gemma 2, slopes as in
    ALiBi (arXiv 2108.12409).
    """
    PAGED_ATTENTION.check_inputs(
        q, k, v, kv_cache, block_tables, cu_seqlens, context_lens, slot_mapping,
        sinks, alibi_slopes, k_scale, v_scale,
    )  # fmt: skip
    unit = np.ones(1, np.float32)
    k_scale, v_scale = (unit if given is None else given for given in (k_scale, v_scale))
    cache = kv_cache.copy()
    block_size = cache.shape[2]
    for token, slot in enumerate(slot_mapping):
        if slot >= 0:
            block, offset = divmod(int(slot), block_size)
            cache[block, 0, offset] = as_stored(k[token].astype(np.float32) / k_scale, cache.dtype)
            cache[block, 1, offset] = as_stored(v[token].astype(np.float32) / v_scale, cache.dtype)

    keys_of, values_of = cache[:, 0].astype(np.float32) * k_scale, cache[:, 1].astype(np.float32) * v_scale
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]  # query heads that share a KV head
    for sequence, context_len in enumerate(context_lens):
        begin, end = int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1])
        for token in range(begin, end):
            position = int(context_len) - (end - token)
            first = max(0, position - window + 1) if window else 0
            seen = np.arange(first, position + 1)
            blocks, offsets = block_tables[sequence, seen // block_size], seen % block_size
            for head in range(q.shape[1]):
                keys = keys_of[blocks, offsets, head // group]  # [seen, D]
                values = values_of[blocks, offsets, head // group]
                scores = keys @ q[token, head].astype(np.float32) * np.float32(scale)
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                if alibi_slopes is not None:
                    scores += alibi_slopes[head] * (seen - position).astype(np.float32)
                if sinks is not None:  # takes its share of the softmax and gives nothing back
                    scores = np.append(scores, np.float32(sinks[head]))
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[token, head] = weights[: len(seen)] @ values
    return out, cache


def as_stored(x: Array, dtype: npt.DTypeLike) -> Array:
    """Scaled keys or values as a cache of this dtype keeps them: nearest, ties to even, saturating."""
    dtype = np.dtype(dtype)
    if dtype == np.int8:
        x = np.rint(x).clip(-128, 127)
    elif dtype.name == "float8_e4m3fn":
        x = x.clip(-E4M3_MAX, E4M3_MAX)
    return x.astype(dtype)

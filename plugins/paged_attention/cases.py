"""Cases of PagedAttention, fed alike to its reference, its body, its kernels and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trtforge.plugins.op import Array, AttributeValue
from trtforge.plugins.paged_attention.reference import as_stored

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
}

# Scales of keys and values, with which normal values use an 8-bit type's range.
_SCALES = {"int8": (0.03, 0.02), "float8_e4m3fn": (0.5, 1.0), "bfloat16": (0.5, 2.0)}

# How far from the reference kernels, and bodies of the same dtype, may be. All sum in float32, but the
# reference rounds once, and the others round weights too (at most 1, so that this is the smaller part): where
# that decides how the result is rounded, it differs by one unit in the last place, which for results below 4
# is 2^-6 in bfloat16 and 2^-9 in float16. An 8-bit cache adds nothing: all read the same stored values.
TOLERANCE = {"float32": 1e-5, "float16": 2.5e-3, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class Case:
    """One step of one attention layer."""

    name: str
    lens: tuple[tuple[int, int], ...]  # a sequence: new tokens, all tokens
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "bfloat16"
    cache_dtype: str = ""  # empty: dtype
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    scaled: bool | None = None  # the cache has scales; None: if it has 8 bits
    padding: int = 0  # tokens of no sequence
    max_context: int = 0  # room in the block tables; 0: what the longest sequence needs
    quick: bool = False  # in the trimmed list, for Triton's interpreter

    @property
    def kv_dtype(self) -> str:
        """Of the cache's elements."""
        return self.cache_dtype or self.dtype

    @property
    def attributes(self) -> dict[str, AttributeValue]:
        """Of the node."""
        return {"scale": self.head_dim**-0.5, "window": self.window, "softcap": self.softcap}


MIXED = ((1, 37), (5, 5), (1, 130), (33, 70), (1, 1), (7, 100))
DECODE = ((1, 1), (1, 16), (1, 17), (1, 300))

CASES = (
    Case("mixed", MIXED, quick=True),
    Case("mixed-float16", MIXED, dtype="float16", quick=True),
    Case("prefill", ((70, 70), (3, 3)), quick=True),
    Case("prefill-of-one", ((150, 150),), quick=True),
    # What the first token sees ends just before, at and behind the end of a tile of 64.
    Case("chunks", ((40, 102), (40, 103), (40, 104)), quick=True),
    Case("decode", DECODE, quick=True),
    Case("decode-split", DECODE, max_context=4096, quick=True),
    Case("decode-of-one", ((1, 700),), quick=True),
    Case("drafted-tokens", ((4, 30), (3, 600), (1, 9), (2, 2)), quick=True),
    Case("idle-sequences", ((3, 40), (0, 12), (0, 0), (1, 33)), quick=True),
    Case("padded", ((1, 20), (1, 5), (0, 0), (0, 0)), padding=2, max_context=2048, quick=True),
    Case("padded-prefill", ((20, 30), (0, 0)), padding=12, quick=True),
    # No more tokens than sequences, though one of them has several.
    Case("long-among-idle", ((5, 520), (1, 300), *[(0, 0)] * 4), heads=16, max_context=2048, quick=True),
    Case("window", MIXED, window=20, quick=True),
    Case("window-decode", DECODE, window=9, quick=True),
    Case("window-split", ((1, 900), (1, 40)), window=600, quick=True),
    Case("window-of-one", ((6, 20), (1, 30)), window=1, quick=True),
    Case("softcap", MIXED, softcap=3.0, quick=True),
    Case("sinks", MIXED, sinks=True, quick=True),
    Case("alibi", MIXED, alibi=True, quick=True),
    Case("all-features", MIXED, window=50, softcap=5.0, sinks=True, alibi=True, quick=True),
    Case(
        "all-features-split", ((1, 700), (2, 300), (1, 9)), window=650, softcap=5.0, sinks=True, alibi=True,
        max_context=2048, quick=True,
    ),
    *(
        Case(f"head-dim-{dim}", MIXED[:4], heads=4, head_dim=dim, block_size=32, quick=dim in (80, 256))
        for dim in (80, 96, 128, 256)
    ),
    *(Case(f"block-size-{size}", MIXED, block_size=size, quick=size == 128) for size in (32, 64, 128)),
    Case("multi-head", MIXED, heads=3, kv_heads=3, quick=True),
    Case("multi-query", MIXED, heads=7, kv_heads=1, quick=True),
    Case("group-of-64", MIXED, heads=64, kv_heads=1),
    Case("e4m3", MIXED, cache_dtype="float8_e4m3fn", quick=True),
    Case("e4m3-float16", MIXED, dtype="float16", cache_dtype="float8_e4m3fn"),
    Case("e4m3-split", DECODE, cache_dtype="float8_e4m3fn", max_context=4096, quick=True),
    Case(
        "e4m3-features", MIXED, cache_dtype="float8_e4m3fn", window=50, softcap=5.0, sinks=True, alibi=True,
        quick=True,
    ),
    Case("e4m3-without-scales", MIXED, cache_dtype="float8_e4m3fn", scaled=False, quick=True),
    Case("int8", MIXED, cache_dtype="int8", quick=True),
    Case("int8-float16", MIXED, dtype="float16", cache_dtype="int8"),
    Case("int8-split", DECODE, cache_dtype="int8", max_context=4096),
    Case("scaled", MIXED, scaled=True, quick=True),
    Case("llama-8b-mixed", ((1, 1000), (1, 3), (300, 900), (1, 513)), 32, 8, 128, 64),
    Case("llama-8b-e4m3", ((1, 1000), (1, 3), (300, 900)), 32, 8, 128, 64, cache_dtype="float8_e4m3fn"),
    Case("gpt-oss-window", ((1, 1000), (200, 300)), 64, 8, 64, 64, window=128, sinks=True),
    Case("gemma-2-9b", ((1, 500), (90, 90)), 16, 8, 256, 64, softcap=50.0, window=400),
)  # fmt: skip


def make_inputs(case: Case) -> dict[str, Array]:
    """The operator's inputs by name, the same in every call.

    What must not be read is poison: slots of the cache that hold no token which is seen (NaN, or the number
    of the largest magnitude), entries of block tables for blocks without such tokens (-1), and what is of no
    sequence (NaN).
    """
    rng = np.random.default_rng([case.heads, case.head_dim, *(new + total for new, total in case.lens)])
    dtype, kv_dtype = DTYPES[case.dtype], DTYPES[case.kv_dtype]
    new_lens, context_lens = np.ascontiguousarray(np.array(case.lens, np.int32).T)
    tables, num_blocks = _block_tables(rng, case, context_lens)
    scales = _scales(case)
    cache = np.full((num_blocks, 2, case.block_size, case.kv_heads, case.head_dim), _poison(kv_dtype))
    slots = []
    for sequence, (new, total) in enumerate(case.lens):
        positions = np.arange(total)
        blocks, offsets = tables[sequence, positions // case.block_size], positions % case.block_size
        slots.append((blocks * case.block_size + offsets)[total - new :])
        past = slice(_first_seen(case, new, total), total - new)
        for kind, scale in enumerate((scales.get("k_scale"), scales.get("v_scale"))):
            x = _normal(rng, total, case.kv_heads, case.head_dim) / (1 if scale is None else scale)
            cache[blocks[past], kind, offsets[past]] = as_stored(x, kv_dtype)[past]
        tables[sequence, : past.start // case.block_size] = -1  # has left the window
    num_tokens = int(new_lens.sum()) + case.padding
    inputs = {
        "q": _normal(rng, num_tokens, case.heads, case.head_dim).astype(dtype),
        "k": _normal(rng, num_tokens, case.kv_heads, case.head_dim).astype(dtype),
        "v": _normal(rng, num_tokens, case.kv_heads, case.head_dim).astype(dtype),
        "kv_cache": cache,
        "block_tables": tables,
        "cu_seqlens": np.cumsum([0, *new_lens], dtype=np.int32),
        "context_lens": context_lens,
        "slot_mapping": np.concatenate([*slots, np.full(case.padding, -1)]).astype(np.int32),
    }
    for name in ("q", "k", "v"):
        inputs[name][num_tokens - case.padding :] = np.nan
    if case.sinks:
        inputs["sinks"] = _normal(rng, case.heads).astype(dtype)
    if case.alibi:
        inputs["alibi_slopes"] = (2.0 ** -np.linspace(1, 8, case.heads)).astype(np.float32)
    return inputs | scales


def _first_seen(case: Case, new: int, total: int) -> int:
    return max(0, total - new - case.window + 1) if case.window else 0


def _block_tables(rng: np.random.Generator, case: Case, context_lens: Array) -> tuple[Array, int]:
    used = -(-context_lens // case.block_size)
    num_blocks = int(used.sum()) + 3
    room = max(int(used.max()), -(-case.max_context // case.block_size))
    tables = np.full((len(case.lens), room), -1, np.int32)
    blocks = rng.permutation(num_blocks)
    for sequence, count in enumerate(used):
        tables[sequence, :count], blocks = blocks[:count], blocks[count:]
    return tables, num_blocks


def _scales(case: Case) -> dict[str, Array]:
    has_bytes = case.kv_dtype in ("int8", "float8_e4m3fn")
    if not (has_bytes if case.scaled is None else case.scaled):
        return {}
    k_scale, v_scale = _SCALES[case.kv_dtype]
    return {"k_scale": np.array([k_scale], np.float32), "v_scale": np.array([v_scale], np.float32)}


def _poison(dtype: np.dtype[Any]) -> Array:
    return np.array(-128 if dtype == np.int8 else np.nan).astype(dtype)


def _normal(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32)

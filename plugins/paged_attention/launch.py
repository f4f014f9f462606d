"""How PagedAttention is launched: which tiles, how many splits, and what each kernel gets.

Lengths are known on the device only. Sequences with few new tokens (decode, also of some drafted tokens)
and those with many (prefill) are told apart there: both kernels are launched over all of them, and each
leaves at once what is the other's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtforge.errors import PluginError
from trtforge.plugins.launch import TRITON_TYPES, Call, Constant, Gpu, Kernel, Launch, Plan

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GROUP = 64
QUERY_DTYPES = ("float16", "bfloat16")
BYTE_CACHES = ("float8_e4m3fn", "int8")  # else a cache has the queries' dtype


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel cuts its work up."""

    rows: int  # of queries: tokens x heads of a group
    tile: int  # tokens of the cache
    num_warps: int
    # The load of block numbers takes stages of its own: 5 leave two buffers of keys and values, fewer one.
    num_stages: int = 5


# Tiles of 9.0 with heads of 128 are the fastest of those measured on an H200 (docs/gpu.md), and taken for
# other heads and for 10.0 too; those of other GPUs are unmeasured.

# These have 227 KiB of shared memory a block. All others are taken to have 99 KiB, also 80, whose machine
# code runs on 86.
_LARGE = (90, 100)


def decode_tiles(arch: int, head_dim: int, group: int, cache_bytes: int) -> Tiles:
    """Tiles for sequences with few new tokens. `cache_bytes` is the size of an element."""
    rows = max(16, _power_of_two(group))
    num_warps = 8 if rows * head_dim > 64 * 128 else 4
    if head_dim == 256:
        return Tiles(rows, 32, num_warps)
    if arch in _LARGE:
        return Tiles(rows, 128, num_warps, num_stages=4 if cache_bytes == 2 else 5)
    return Tiles(rows, 64, num_warps)


def prefill_tiles(arch: int, head_dim: int, cache_bytes: int) -> Tiles:
    """Tiles for sequences with many new tokens. `cache_bytes` is the size of an element."""
    rows, tile = 128, 32
    if arch in _LARGE:
        tile = 128 if cache_bytes == 2 else 64
    if head_dim == 256:
        tile = 32 if arch in _LARGE else 16
        if cache_bytes == 1 or arch not in _LARGE:  # registers do not suffice for more
            rows = 64
    return Tiles(rows, tile, num_warps=8)


# Splits of contexts: as many as leave no more programs than this for each multiprocessor, unless their parts
# become too short to be worth it.
_PROGRAMS_PER_SM = 2
_MIN_SPLIT_TOKENS = 256
_SPLITS_AT_ONCE = 16  # in `combine`
_APPEND_CHUNK = 1024


def plan(call: Call, gpu: Gpu) -> Plan:
    """Append, then decode and prefill, as far as sequences of these shapes may need them.

    `call` has at least one token and one sequence. Raises PluginError for what the kernels cannot do.
    """
    layer = _layer(call, gpu.arch)
    num_tokens, num_seqs = call.shapes["q"][0], call.shapes["context_lens"][0]
    max_blocks = call.shapes["block_tables"][1]
    if num_tokens < 1 or num_seqs < 1:
        raise PluginError(
            f"PagedAttention of {num_tokens} tokens in {num_seqs} sequences: there is none to do"
        )
    at_once = layer.decode.rows // layer.group
    if num_tokens <= num_seqs:
        max_decode = num_tokens  # one each; should one sequence have several, they take turns
    elif num_seqs > 1 or num_tokens <= at_once:
        max_decode = at_once
    else:
        max_decode = 0
    max_context = max_blocks * layer.block_size
    splits = _num_splits(layer, num_seqs, max_context, gpu.num_sms)
    numbers: dict[str, int | float] = {
        "num_seqs": num_seqs,
        "max_blocks": max_blocks,
        "scale": float(call.attributes["scale"]),
        "max_tokens": max_decode,
        "min_tokens": max_decode + 1,
        "num_splits": splits,
    }
    launches = [_launch(layer, "append", (num_tokens, 1, 1), numbers)]
    if max_decode:
        function = "decode" if splits == 1 else "decode_split"
        launches.append(_launch(layer, function, (num_seqs, layer.num_kv_heads, splits), numbers))
        if splits > 1:
            launches.append(_launch(layer, "combine", (num_seqs, layer.num_heads, 1), numbers))
    if num_tokens > max_decode:
        num_tiles = num_tokens // (layer.prefill.rows // layer.group) + num_seqs
        launches.append(_launch(layer, "prefill", (num_tiles, layer.num_kv_heads, 1), numbers))
    return Plan(tuple(launches), _workspace(layer, num_seqs, max_context, gpu.num_sms))


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    """Every kernel that `plan` may use for this layer, whatever the numbers of tokens and sequences."""
    layer = _layer(call, arch)
    return tuple(_kernel(layer, name) for name in ("append", "decode", "decode_split", "combine", "prefill"))


def _max_splits(layer: _Layer, max_context: int) -> int:
    return (min(max_context, layer.window) if layer.window else max_context) // _MIN_SPLIT_TOKENS


def _num_splits(layer: _Layer, num_seqs: int, max_context: int, num_sms: int) -> int:
    wanted = _PROGRAMS_PER_SM * num_sms // (num_seqs * layer.num_kv_heads)
    return max(1, min(wanted, _max_splits(layer, max_context)))


def _workspace(layer: _Layer, num_seqs: int, max_context: int, num_sms: int) -> dict[str, int]:
    """What splits leave, in bytes, also of calls of fewer sequences and shorter contexts.

    More sequences are split less, but a larger call must not need less memory than a smaller one.
    """
    max_splits = _max_splits(layer, max_context)
    most = _PROGRAMS_PER_SM * num_sms // layer.num_kv_heads  # splits of all sequences together
    if min(max_splits, most) < 2:
        return {}
    parts = min(most, num_seqs * max_splits)
    rows = parts * layer.num_heads * (layer.decode.rows // layer.group)
    return {"partial_out": 4 * rows * layer.head_dim, "partial_lse": 4 * rows}


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is fixed in a model's attention layer, and how it is cut up."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # Triton's names
    cache_dtype: str
    window: int
    softcap: float
    present: frozenset[str]  # inputs
    decode: Tiles
    prefill: Tiles

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


def _layer(call: Call, arch: int) -> _Layer:
    _, num_heads, head_dim = call.shapes["q"]
    _, _, block_size, num_kv_heads, _ = call.shapes["kv_cache"]
    dtype, cache_dtype = call.dtypes["q"], call.dtypes["kv_cache"]
    _check(dtype in QUERY_DTYPES, f"queries of {dtype}", f"one of {QUERY_DTYPES}")
    cache_dtypes = (dtype, *BYTE_CACHES)
    _check(cache_dtype in cache_dtypes, f"a cache of {cache_dtype}", f"for {dtype} one of {cache_dtypes}")
    others = dict.fromkeys(("block_tables", "cu_seqlens", "context_lens", "slot_mapping"), "int32")
    others |= dict.fromkeys(("alibi_slopes", "k_scale", "v_scale"), "float32") | {"sinks": dtype}
    for name, allowed in others.items():
        given = call.dtypes.get(name, allowed)
        _check(given == allowed, f"{name} of {given}", allowed)
    _check(head_dim in HEAD_DIMS, f"head_dim {head_dim}", f"one of {HEAD_DIMS}")
    _check(block_size in BLOCK_SIZES, f"block_size {block_size}", f"one of {BLOCK_SIZES}")
    _check(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0 and 0 < num_heads // num_kv_heads <= MAX_GROUP,
        f"{num_heads} heads over {num_kv_heads} KV heads",
        f"a whole number of heads for each KV head, {MAX_GROUP} at most",
    )
    group, cache_bytes = num_heads // num_kv_heads, 1 if cache_dtype in BYTE_CACHES else 2
    return _Layer(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=TRITON_TYPES[dtype],
        # sm_80 has no e4m3: kernels take its bits.
        cache_dtype="u8" if arch < 89 and cache_dtype == "float8_e4m3fn" else TRITON_TYPES[cache_dtype],
        window=int(call.attributes["window"]),
        softcap=float(call.attributes["softcap"]),
        present=frozenset(call.shapes),
        decode=decode_tiles(arch, head_dim, group, cache_bytes),
        prefill=prefill_tiles(arch, head_dim, cache_bytes),
    )


def _check(fits: bool, what: str, allowed: str) -> None:
    if not fits:
        raise PluginError(f"PagedAttention has no kernel for {what}; it takes {allowed}")


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


# --------------------------------------------------------------------------- kernels and their arguments

_CACHE = ("kv_cache", "block_tables", "cu_seqlens", "context_lens")
_OPTIONAL = ("sinks", "alibi_slopes", "k_scale", "v_scale")
_PARTIAL = ("partial_out", "partial_lse")
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "append": ("out", "k", "v", "kv_cache", "cu_seqlens", "slot_mapping", "k_scale", "v_scale", "num_seqs"),
    "decode": ("out", *_PARTIAL, "q", *_CACHE, *_OPTIONAL, "scale", "max_blocks", "max_tokens"),
    "combine": ("out", *_PARTIAL, "cu_seqlens", "context_lens", "num_splits", "max_tokens"),
    "prefill": ("out", "q", *_CACHE, *_OPTIONAL, "scale", "num_seqs", "max_blocks", "min_tokens"),
}
_NUMBERS = {"scale": "fp32"} | dict.fromkeys(
    ("num_seqs", "max_blocks", "max_tokens", "min_tokens", "num_splits"), "i32"
)


def _kernel(layer: _Layer, name: str) -> Kernel:
    function = name.removesuffix("_split")
    tiles = {"prefill": layer.prefill}.get(function, layer.decode)
    types = dict.fromkeys(("out", "q", "k", "v", "sinks"), f"*{layer.dtype}")
    types |= dict.fromkeys((*_PARTIAL, "alibi_slopes", "k_scale", "v_scale"), "*fp32")
    types |= dict.fromkeys(("block_tables", "cu_seqlens", "context_lens", "slot_mapping"), "*i32")
    types |= _NUMBERS | {"kv_cache": f"*{layer.cache_dtype}"}
    shape = {
        "NUM_KV_HEADS": layer.num_kv_heads,
        "GROUP": layer.group,
        "HEAD_DIM": layer.head_dim,
        "BLOCK_SIZE": layer.block_size,
    }
    scales = {f"HAS_{scale.upper()}": scale in layer.present for scale in ("k_scale", "v_scale")}
    dims = {"TILE": tiles.tile, "DIMS": _power_of_two(layer.head_dim)}
    min_tiles = {"MIN_TILES": _MIN_SPLIT_TOKENS // tiles.tile}
    features = {
        "WINDOW": layer.window,
        "SOFTCAP": layer.softcap,
        "HAS_SINKS": "sinks" in layer.present,
        "HAS_ALIBI": "alibi_slopes" in layer.present,
    }
    constants: Mapping[str, Constant]
    if function == "append":
        constants = shape | scales | {"CHUNK": _APPEND_CHUNK}
    elif function == "combine":
        constants = {
            "NUM_HEADS": layer.num_heads,
            "HEAD_DIM": layer.head_dim,
            "WINDOW": layer.window,
            "TOKENS": tiles.rows // layer.group,
            "SPLITS": _SPLITS_AT_ONCE,
        }
        constants = constants | dims | min_tiles
    else:
        constants = shape | features | scales | dims | {"ROWS": tiles.rows}
        if function == "decode":
            constants = constants | min_tiles | {"SPLIT": name == "decode_split"}
    return Kernel(
        operator="paged_attention",
        function=function,
        parameters=tuple((parameter, types[parameter]) for parameter in _PARAMETERS[function]),
        constants=tuple(constants.items()),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _launch(
    layer: _Layer, name: str, grid: tuple[int, int, int], numbers: Mapping[str, int | float]
) -> Launch:
    kernel = _kernel(layer, name)
    missing = {parameter for parameter in _OPTIONAL if parameter not in layer.present}
    if name == "decode":
        missing |= set(_PARTIAL)
    arguments: dict[str, str | int | float | None] = {}
    for parameter, _ in kernel.parameters:
        arguments[parameter] = None if parameter in missing else numbers.get(parameter, parameter)
    if "kv_cache" in arguments:
        arguments["kv_cache"] = "kv_cache_out"  # the same memory, written in place
    return Launch(kernel, grid, arguments)

"""Which kernel computes QkNorm: one program for a tile of heads. Its size is unmeasured."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.launch import TRITON_TYPES, Call, Gpu, Kernel, Launch, Plan

_TENSORS = ("q_out", "k_out", "q", "k", "q_weight", "k_weight")
_TILE = 1024  # elements: with 4 warps one load of 16 bytes a thread


def plan(call: Call, gpu: Gpu) -> Plan:
    """Raises PluginError for shapes and dtypes that the kernel does not have."""
    (kernel,) = choices(call, gpu.arch)
    num_tokens, num_heads, head_dim = call.shapes["q"]
    _, num_kv_heads, _ = call.shapes["k"]
    num_rows = _rows_of_a_tile(head_dim)
    num_tiles = -(-num_tokens * num_heads // num_rows) + -(-num_tokens * num_kv_heads // num_rows)
    arguments: dict[str, str | int | float | None] = {name: name for name in _TENSORS}
    arguments |= {"num_tokens": num_tokens, "eps": float(call.attributes["eps"])}
    return Plan((Launch(kernel, (num_tiles, 1, 1), arguments),), {})


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    """The kernel, which is the same for any number of tokens and any GPU."""
    num_tokens, num_heads, head_dim = call.shapes["q"]
    _, num_kv_heads, _ = call.shapes["k"]
    expected = {
        "k": (num_tokens, num_kv_heads, head_dim),
        "q_weight": (head_dim,),
        "k_weight": (head_dim,),
    }
    for name, shape in expected.items():
        if call.shapes[name] != shape:
            raise PluginError(f"QkNorm: {name} has shape {call.shapes[name]}, expected {shape}")
    if head_dim > _TILE:
        raise PluginError(f"QkNorm has heads of {head_dim}, at most {_TILE} are possible")
    pointer = f"*{TRITON_TYPES[call.dtypes['q']]}"
    return (
        Kernel(
            operator="qk_norm",
            function="qk_norm",
            parameters=(
                *((name, pointer) for name in _TENSORS),
                ("num_tokens", "i32"),
                ("eps", "fp32"),
            ),
            constants=(
                ("HEADS", num_heads),
                ("KV_HEADS", num_kv_heads),
                ("DIM", head_dim),
                ("ROWS", _rows_of_a_tile(head_dim)),
                ("UNIT_OFFSET", bool(call.attributes["unit_offset"])),
            ),
            num_warps=4,
            num_stages=1,
        ),
    )


def _rows_of_a_tile(head_dim: int) -> int:
    """A power of two, as the Triton language wants it."""
    return _TILE // (1 << (head_dim - 1).bit_length())

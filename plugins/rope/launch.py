"""Which kernel computes Rope: one program for all heads of a token. The number of warps is unmeasured."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.launch import TRITON_TYPES, Call, Gpu, Kernel, Launch, Plan
from trtforge.plugins.rope.op import rotated_size

_TENSORS = ("q_out", "k_out", "q", "k", "cos", "sin")


def plan(call: Call, gpu: Gpu) -> Plan:
    """Raises PluginError for shapes and attributes that the kernel does not have."""
    (kernel,) = choices(call, gpu.arch)
    launch = Launch(kernel, (call.shapes["q"][0], 1, 1), {name: name for name in _TENSORS})
    return Plan((launch,), {})


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    """The kernel, which is the same for any number of tokens and any GPU."""
    num_tokens, num_heads, head_dim = call.shapes["q"]
    _, num_kv_heads, _ = call.shapes["k"]
    _, num_pairs = call.shapes["cos"]
    expected = {
        "k": (num_tokens, num_kv_heads, head_dim),
        "cos": (num_tokens, num_pairs),
        "sin": (num_tokens, num_pairs),
    }
    for name, shape in expected.items():
        if call.shapes[name] != shape:
            raise PluginError(f"Rope: {name} has shape {call.shapes[name]}, expected {shape}")
    rotated_size(head_dim, num_pairs, call.attributes["rotary_dim"])
    types = {name: TRITON_TYPES[call.dtypes["cos" if name in ("cos", "sin") else "q"]] for name in _TENSORS}
    return (
        Kernel(
            operator="rope",
            function="rope",
            parameters=tuple((name, f"*{kind}") for name, kind in types.items()),
            constants=(
                ("HEADS", num_heads),
                ("KV_HEADS", num_kv_heads),
                ("DIM", head_dim),
                ("PAIRS", num_pairs),
                ("INTERLEAVED", bool(call.attributes["interleaved"])),
            ),
            num_warps=4,
            num_stages=1,
        ),
    )

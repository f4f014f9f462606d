"""Which kernel computes SiluMul: one program for a part of a token's row. Its size is unmeasured."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.launch import TRITON_TYPES, Call, Gpu, Kernel, Launch, Plan
from trtforge.plugins.silu_mul.op import check_activation

_BLOCK = 1024  # with 4 warps one load of 16 bytes a thread from either half


def plan(call: Call, gpu: Gpu) -> Plan:
    """Raises PluginError for shapes and attributes that the kernel does not have."""
    (kernel,) = choices(call, gpu.arch)
    num_tokens, _, intermediate_size = call.shapes["gate_up"]
    grid = (num_tokens, -(-intermediate_size // _BLOCK), 1)
    return Plan((Launch(kernel, grid, {"y": "y", "gate_up": "gate_up"}),), {})


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    """The kernel, which is the same for any number of tokens and any GPU."""
    _, halves, intermediate_size = call.shapes["gate_up"]
    if halves != 2:
        raise PluginError(f"SiluMul: gate_up has shape {call.shapes['gate_up']}, expected 2 at dim 1")
    activation = call.attributes["activation"]
    check_activation(activation)
    pointer = f"*{TRITON_TYPES[call.dtypes['gate_up']]}"
    return (
        Kernel(
            operator="silu_mul",
            function="silu_mul",
            parameters=(("y", pointer), ("gate_up", pointer)),
            constants=(
                ("INTERMEDIATE", intermediate_size),
                ("GELU", activation == "gelu_tanh"),
                ("BLOCK", _BLOCK),
            ),
            num_warps=4,
            num_stages=1,
        ),
    )

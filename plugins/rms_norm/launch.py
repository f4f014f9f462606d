"""Which kernel computes AddRmsNorm: one program a token. The number of warps is unmeasured."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.launch import TRITON_TYPES, Call, Gpu, Kernel, Launch, Plan

_MAX_HIDDEN = 32768  # a row is held in registers


def plan(call: Call, gpu: Gpu) -> Plan:
    """Raises PluginError for shapes and dtypes that the kernel does not have."""
    (kernel,) = choices(call, gpu.arch)
    arguments = {name: name for name in ("y", "h", "x", "residual", "weight")}
    num_tokens = call.shapes["x"][0]
    launch = Launch(kernel, (num_tokens, 1, 1), arguments | {"eps": float(call.attributes["eps"])})
    return Plan((launch,), {})


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    """The kernel, which is the same for any number of tokens and any GPU."""
    _, hidden_size = call.shapes["x"]
    if call.shapes["residual"] != call.shapes["x"] or call.shapes["weight"] != (hidden_size,):
        raise PluginError(
            f"AddRmsNorm: residual {call.shapes['residual']} and weight {call.shapes['weight']} do not fit x "
            f"{call.shapes['x']}"
        )
    if hidden_size > _MAX_HIDDEN:
        raise PluginError(f"AddRmsNorm has rows of {hidden_size}, at most {_MAX_HIDDEN} are possible")
    block = 1 << (hidden_size - 1).bit_length()
    pointer = f"*{TRITON_TYPES[call.dtypes['x']]}"
    parameters = tuple((name, pointer) for name in ("y", "h", "x", "residual", "weight"))
    return (
        Kernel(
            operator="rms_norm",
            function="add_rms_norm",
            parameters=(*parameters, ("eps", "fp32")),
            constants=(("HIDDEN", hidden_size), ("BLOCK", block)),
            num_warps=min(16, max(1, block // 512)),
            num_stages=1,
        ),
    )

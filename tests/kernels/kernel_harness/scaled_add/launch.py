"""How ScaledAdd is launched: a block of the size that suits the number of elements."""

from __future__ import annotations

from math import prod

from trtforge.errors import PluginError
from trtforge.plugins.launch import TRITON_TYPES, Call, Gpu, Kernel, Launch, Plan

SMALL, LARGE = 128, 512


def plan(call: Call, gpu: Gpu) -> Plan:
    num_elements = prod(call.shapes["total"])
    block = SMALL if num_elements < SMALL * gpu.num_sms else LARGE
    launch = Launch(
        kernel=_kernel(call, block),
        grid=(-(-num_elements // block), 1, 1),
        arguments={
            "total": "total_out",
            "x": "x",
            "scale": float(call.attributes["scale"]),
            "num_elements": num_elements,
        },
    )
    return Plan((launch,), {})


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    return tuple(_kernel(call, block) for block in (SMALL, LARGE))


def _kernel(call: Call, block: int) -> Kernel:
    if call.dtypes["total"] not in TRITON_TYPES:
        raise PluginError(f"ScaledAdd of {call.dtypes['total']}: it takes {sorted(TRITON_TYPES)}")
    pointer = f"*{TRITON_TYPES[call.dtypes['total']]}"
    return Kernel(
        operator="kernel_harness.scaled_add",
        function="scaled_add",
        parameters=(("total", pointer), ("x", pointer), ("scale", "fp32"), ("num_elements", "i32")),
        constants=(("BLOCK", block),),
        num_warps=4,
        num_stages=1,
    )

"""Plans run by Triton's interpreter through addresses alone, as the driver runs them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from kernel_harness.interpret import H100, run
from trtforge.plugins.launch import Plan, workspace_layout

_VIEW_BYTES = 1 << 30  # seen from an address on; what is behind a tensor is not read


class InterpreterLauncher:
    """Takes addresses of host memory."""

    gpu = H100

    def launch(self, plan: Plan, pointers: Mapping[str, int], workspace_pointer: int, stream: int) -> None:
        """Run the launches of `plan`, in order."""
        offsets, _ = workspace_layout(plan)
        addresses = {**pointers, **{name: workspace_pointer + offset for name, offset in offsets.items()}}
        buffers = {
            name: torch.frombuffer((ctypes.c_uint8 * _VIEW_BYTES).from_address(address), dtype=torch.uint8)
            for name, address in addresses.items()
        }
        for launch in plan.launches:
            run(launch, buffers)

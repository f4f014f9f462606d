"""Compiles the kernels of all cases and benchmarks for this GPU, and loads every one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch
from gpu.attention import ATTENTION_CALLS
from gpu.gemm import GEMM_CALLS
from gpu.part import Outcome, Settings, Table, run_part
from gpu.samples import all_samples

from trtforge.errors import PluginError
from trtforge.plugins.aot import write_bundle
from trtforge.plugins.bundle import arch_for
from trtforge.plugins.examples import EXAMPLES
from trtforge.plugins.graph_calls import kernels_for
from trtforge.plugins.launch import Call, Launch, Plan
from trtforge.plugins.launcher import Launcher


def compile_kernels(settings: Settings) -> Outcome:
    """A problem for each kernel that the driver does not load."""
    major, minor = torch.cuda.get_device_capability()
    arch = arch_for(10 * major + minor)
    kernels = kernels_for(_calls(), arch)
    begin = time.perf_counter()
    bundle = write_bundle({arch: kernels}, settings.bundle, num_processes=os.cpu_count() or 1)
    compiled = time.perf_counter()
    launcher = Launcher(bundle)
    problems = []
    for kernel in kernels:
        try:
            arguments = dict.fromkeys(name for name, _ in kernel.parameters)
            launcher.load(Plan((Launch(kernel, (1, 1, 1), arguments),), {}))
        except PluginError as error:
            problems.append(str(error))
    row = (f"sm_{arch}", len(kernels), compiled - begin, time.perf_counter() - compiled)
    columns = ("arch", "kernels", "compiled in, s", "loaded in, s")
    return Outcome(problems, [Table("Kernels", columns, [row])])


def _calls() -> Iterator[tuple[str, Call]]:
    for sample in all_samples():
        yield sample.operator, sample.call
    for calls in EXAMPLES.values():
        yield from calls
    yield from ATTENTION_CALLS
    yield from GEMM_CALLS


if __name__ == "__main__":
    run_part(__doc__, compile_kernels)

"""Compiles the kernels of all cases and benchmarks for this GPU, unless that is done, and loads them.

To compile them on a machine without a GPU, for `verify_gpu.sh --bundle FOLDER` on one that has it:

    PYTHONPATH=src:benchmarks python -m gpu.compile_kernels ahead FOLDER sm_90
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu.attention import ATTENTION_CALLS
from gpu.gemm import GEMM_CALLS
from gpu.part import Outcome, Settings, Table, run_part
from gpu.samples import all_samples

from trtforge.errors import PluginError
from trtforge.plugins.aot import write_bundle
from trtforge.plugins.bundle import Bundle, arch_for
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
    bundle = Bundle.load(settings.bundle) if settings.bundle.is_dir() else compile_for(arch, settings.bundle)
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


def compile_for(arch: int, folder: Path) -> Bundle:
    """All kernels into a bundle."""
    return write_bundle({arch: kernels_for(_calls(), arch)}, folder, num_processes=os.cpu_count() or 1)


def _calls() -> Iterator[tuple[str, Call]]:
    for sample in all_samples():
        yield sample.operator, sample.call
    for calls in EXAMPLES.values():
        yield from calls
    yield from ATTENTION_CALLS
    yield from GEMM_CALLS


if __name__ == "__main__":
    if sys.argv[1:2] == ["ahead"]:
        compile_for(int(sys.argv[3].removeprefix("sm_")), Path(sys.argv[2]))
    else:
        run_part(__doc__, compile_kernels)

"""Every case of every operator on the GPU against its reference, launched one by one and as a CUDA graph.

Outputs and workspaces are filled with NaN before a kernel runs; the cases poison what must not be read.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from gpu.part import Outcome, Settings, Table, run_part
from gpu.samples import Sample, all_samples, to_device, to_float32

from trtforge.errors import PluginError
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launcher import Launcher
from trtforge.plugins.op import Array
from trtforge.plugins.operators import OPERATORS
from trtforge.runtime.executors.kernel_calls import KernelCalls


def check_operators(settings: Settings) -> Outcome:
    """All cases; a problem for each that is wrong in either way."""
    # Makes torch fill memory that it hands out.
    torch.use_deterministic_algorithms(True)
    launcher = Launcher(Bundle.load(settings.bundle))
    problems: list[str] = []
    counts: dict[str, list[int]] = {}
    samples = list(all_samples())
    # In processes of their own: they are slow, and there is a time limit.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        references = list(pool.map(Sample.reference, samples))
    for sample, expected in zip(samples, references, strict=True):
        found = _check(sample, expected, launcher)
        problems += found
        passed = counts.setdefault(sample.operator, [0, 0])
        passed[0] += 1
        passed[1] += not found
    rows = [(operator, number, passed) for operator, (number, passed) in counts.items()]
    columns = ("operator", "cases", "right, one by one and as a graph")
    return Outcome(problems, [Table("Operators against their references", columns, rows)])


def _check(sample: Sample, expected: Sequence[Array], launcher: Launcher) -> list[str]:
    operator = OPERATORS[sample.operator]
    problems = []
    try:
        node = node_of(sample, launcher)
        for way, outputs in (("one by one", run(sample, node)), ("as a graph", _run_graph(sample, node))):
            for declared, output, wanted in zip(operator.spec.outputs, outputs, expected, strict=True):
                problem = _difference(output, wanted.astype(np.float32), sample)
                if problem:
                    problems.append(
                        f"{sample.operator} {sample.name}, {way}: {declared.name} is wrong: {problem}"
                    )
    except PluginError as error:
        problems.append(f"{sample.operator} {sample.name}: {error}")
    return problems


def node_of(sample: Sample, launcher: Launcher) -> KernelCalls:
    """The operation with its kernels. Raises PluginError if it has none."""
    operator = OPERATORS[sample.operator]
    if operator.kernels is None:
        raise PluginError(f"{sample.operator} has no kernels")
    return KernelCalls(operator.spec, operator.kernels, sample.attributes, launcher)


def _device_inputs(sample: Sample) -> dict[str, torch.Tensor]:
    return {name: to_device(array) for name, array in sample.inputs.items()}


def _arguments(sample: Sample, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    return [tensors.get(tensor.name) for tensor in OPERATORS[sample.operator].spec.inputs]


def run(sample: Sample, node: KernelCalls) -> list[Array]:
    """The outputs."""
    return [to_float32(output) for output in node(*_arguments(sample, _device_inputs(sample)))]


def _run_graph(sample: Sample, node: KernelCalls) -> list[Array]:
    """Captured with inputs of zeros, replayed with the real ones."""
    tensors = _device_inputs(sample)
    fresh = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name not in ("block_tables", "cu_seqlens", "context_lens", "slot_mapping", "perm"):
            tensor.view(torch.uint8).zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = node(*_arguments(sample, tensors))
    for name, tensor in tensors.items():
        tensor.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    return [to_float32(output) for output in outputs]


def _difference(output: Array, wanted: Array, sample: Sample) -> str:
    """What is wrong, or nothing. NaN where NaN is expected is right: it was never touched."""
    if output.shape != wanted.shape:
        return f"shape {output.shape}, not {wanted.shape}"
    wrong = ~np.isclose(output, wanted, rtol=sample.relative, atol=sample.absolute, equal_nan=True)
    if not wrong.any():
        return ""
    where = tuple(int(index) for index in np.argwhere(wrong)[0])
    return f"{wrong.sum()} of {wrong.size} values, the first at {where}: {output[where]}, not {wanted[where]}"


if __name__ == "__main__":
    run_part(__doc__, check_operators)

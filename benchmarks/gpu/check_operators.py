"""Every case of every operator on the GPU against its reference, launched one by one and as a CUDA graph.

Outputs and workspaces are filled with NaN before a kernel runs; the cases poison what must not be read.
"""

from __future__ import annotations

import numpy as np
import torch
from gpu.part import Outcome, Settings, Table, run_part
from gpu.samples import Sample, all_samples, to_device, to_float32

from trtforge.errors import PluginError
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launcher import Launcher
from trtforge.plugins.operators import OPERATORS
from trtforge.runtime.executors.kernel_calls import KernelCalls


def check_operators(settings: Settings) -> Outcome:
    """All cases; a problem for each that is wrong in either way."""
    # Makes torch fill memory that it hands out.
    torch.use_deterministic_algorithms(True)
    launcher = Launcher(Bundle.load(settings.bundle))
    problems: list[str] = []
    counts: dict[str, list[int]] = {}
    for sample in all_samples():
        found = _check(sample, launcher)
        problems += found
        passed = counts.setdefault(sample.operator, [0, 0])
        passed[0] += 1
        passed[1] += not found
    rows = [(operator, number, passed) for operator, (number, passed) in counts.items()]
    columns = ("operator", "cases", "right, one by one and as a graph")
    return Outcome(problems, [Table("Operators against their references", columns, rows)])


def _check(sample: Sample, launcher: Launcher) -> list[str]:
    operator = OPERATORS[sample.operator]
    if operator.kernels is None:
        return [f"{sample.operator} has no kernels"]
    node = KernelCalls(operator.spec, operator.kernels, sample.attributes, launcher)
    expected = sample.reference()
    problems = []
    try:
        for way, outputs in (("one by one", _run(sample, node)), ("as a graph", _run_graph(sample, node))):
            for declared, output, wanted in zip(operator.spec.outputs, outputs, expected, strict=True):
                problem = _difference(output, wanted.astype(np.float32), sample)
                if problem:
                    problems.append(
                        f"{sample.operator} {sample.name}, {way}: {declared.name} is wrong: {problem}"
                    )
    except PluginError as error:
        problems.append(f"{sample.operator} {sample.name}: {error}")
    return problems


def _device_inputs(sample: Sample) -> dict[str, torch.Tensor]:
    return {name: to_device(array) for name, array in sample.inputs.items()}


def _arguments(sample: Sample, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    return [tensors.get(tensor.name) for tensor in OPERATORS[sample.operator].spec.inputs]


def _run(sample: Sample, node: KernelCalls) -> list[np.ndarray]:
    return [to_float32(output) for output in node(*_arguments(sample, _device_inputs(sample)))]


def _run_graph(sample: Sample, node: KernelCalls) -> list[np.ndarray]:
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


def _difference(output: np.ndarray, wanted: np.ndarray, sample: Sample) -> str:
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

"""What an engine with plugins is made of: a graph in which their nodes stay, and their compiled kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from trtforge.builder.lower import BLOCK_SIZE_DIM, lower
from trtforge.errors import EngineBuildError, PluginError
from trtforge.plugins.aot import Compiled, write_bundle
from trtforge.plugins.bundle import Bundle, arch_for
from trtforge.plugins.graph_calls import calls_of, kernels_for
from trtforge.plugins.kernels import KERNELS
from trtforge.plugins.trt_adapter import name_inputs, register
from trtforge.tensorrt_package import load_package


def lower_for_plugins(graph: Path, block_size: int, tp_size: int = 1) -> tuple[ir.Model, onnx.ModelProto]:
    """The graph in the file `graph` with custom nodes of those operators only that have kernels, as TensorRT
    finds plugins for them; all others are what `lower` makes of them. The second form alone is for TensorRT.
    """
    model = lower(graph, block_size, keep={spec.name for spec in KERNELS}, tp_size=tp_size)
    proto = ir.to_proto(model)
    name_inputs(proto, KERNELS)
    return model, proto


def compile_kernels(
    graphs: Sequence[Path],
    block_size: int,
    compute_capabilities: Sequence[str],
    folder: Path,
    on_progress: Callable[[float, float], None],
) -> Bundle:
    """Compile what the plugins of the ONNX files `graphs` may launch on these GPUs into the bundle `folder`.

    `on_progress` is told how many kernels of how many there are. Raises EngineBuildError for what the kernels
    cannot do, and ConfigError if there is no compiler.
    """
    try:
        sizes = {BLOCK_SIZE_DIM: block_size}
        calls = [call for graph in graphs for call in calls_of(ir.load(graph), sizes)]
        archs = {arch_for(int(capability.replace(".", ""))) for capability in compute_capabilities}
        kernels = {arch: kernels_for(calls, arch) for arch in archs}
        total = sum(map(len, kernels.values()))
        done: list[Compiled] = []

        def on_compiled(compiled: Compiled) -> None:
            done.append(compiled)
            on_progress(len(done), total)

        num_processes = len(os.sched_getaffinity(0))
        return write_bundle(kernels, folder, num_processes=num_processes, on_compiled=on_compiled)
    except PluginError as error:
        raise EngineBuildError(f"kernels of the model's plugins: {error}") from error


def register_plugins(package: str, kernels: Bundle) -> None:
    """Let TensorRT's parser find the plugins, until the process ends. Raises EngineBuildError if it has those
    of another bundle already."""
    try:
        register(load_package(package), KERNELS, kernels)
    except PluginError as error:
        raise EngineBuildError(f"the model's plugins cannot be registered: {error}") from error

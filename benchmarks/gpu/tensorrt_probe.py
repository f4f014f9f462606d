"""What TensorRT and TensorRT-RTX, where they are installed, do with a small engine on this GPU."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gpu.part import Outcome, Settings, run_part

PACKAGES = ("tensorrt", "tensorrt_rtx")
SIZE = 256


def probe(_: Settings) -> Outcome:
    """A fact about each package; what it refuses is a fact, what it computes wrongly a problem."""
    problems, facts = [], []
    for name in PACKAGES:
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            facts.append(f"{name}: not installed ({error}).")
            continue
        answer, is_wrong = _try(package)
        facts.append(f"{name} {package.__version__}: {answer}.")
        if is_wrong:
            problems.append(f"{name} {package.__version__}: {answer}")
    return Outcome(problems, facts=facts)


def _try(package: ModuleType) -> tuple[str, bool]:
    """What happened, and whether a result was wrong."""
    trt: Any = package
    logger = trt.Logger(trt.Logger.ERROR)
    engine_bytes = _build(trt, logger)
    if engine_bytes is None:
        return "builds no engine", False
    engine = trt.Runtime(logger).deserialize_cuda_engine(engine_bytes)
    if engine is None:
        return "builds an engine and refuses to load it on this GPU", False
    context = engine.create_execution_context()
    if context is None:
        return "loads the engine and gives no context for it", False
    x = torch.rand(8, SIZE, device="cuda", dtype=torch.float16)
    y = torch.empty_like(x)
    context.set_input_shape("x", tuple(x.shape))
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        return "loads the engine and does not execute it", False
    torch.cuda.synchronize()
    error = float((y - 2 * x).abs().max())
    return f"builds, loads and runs a product, largest error {error:.4f}", error > 0.01


def _build(trt: Any, logger: Any) -> Any:
    """An engine for y = x @ 2, or None."""
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    x = network.add_input("x", trt.DataType.HALF, (-1, SIZE))
    weight = 2 * np.eye(SIZE, dtype=np.float16)
    constant = network.add_constant(weight.shape, trt.Weights(weight)).get_output(0)
    none = trt.MatrixOperation.NONE
    y = network.add_matrix_multiply(x, none, constant, none).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, SIZE), (8, SIZE), (64, SIZE))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


if __name__ == "__main__":
    run_part(__doc__, probe)

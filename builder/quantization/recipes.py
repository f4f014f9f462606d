"""NVIDIA ModelOpt's recipes for what a build takes from it: scales of inputs, and of rounded activations.

ModelOpt quantizes more than that. What a recipe leaves on is what its algorithm looks at; weights are rounded
when the build writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trtforge.builder.quantization.activations import largest_number
from trtforge.builder.quantization.policy import (
    Calibration,
    Quantization,
    Scales,
    check_exclusions,
    check_projections,
    choose_group_size,
    find_exclusion,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What ModelOpt is told."""

    config: dict[str, Any]
    num_passes: int  # times that the algorithm runs the model


def make_recipe(hf: Any, quantization: Quantization) -> Recipe:
    """AWQ for int4, and static activations otherwise: with SmoothQuant for int8.

    Raises ConfigError if `quantization` fits no projection of `hf`.
    """
    import modelopt.torch.quantization as mtq

    projections = _projections(hf, quantization)
    settings: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    if quantization.format == "int4":
        # It runs the model once to collect statistics and once to search.
        for name, columns in projections.items():
            size = choose_group_size(columns, quantization.group_size)
            if size is not None:
                cfg = {"num_bits": 4, "block_sizes": {-1: size, "type": "static"}}
                settings.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": cfg})
        return Recipe({"quant_cfg": settings, "algorithm": mtq.INT4_AWQ_CFG["algorithm"]}, 2)
    preset = mtq.FP8_DEFAULT_CFG if quantization.format == "fp8" else mtq.INT8_SMOOTHQUANT_CFG
    for kind in ("input_quantizer", "weight_quantizer"):
        cfg = next(entry["cfg"] for entry in preset["quant_cfg"] if entry["quantizer_name"] == f"*{kind}")
        settings += [{"quantizer_name": f"{name}.{kind}", "cfg": cfg} for name in projections]
    return Recipe({"quant_cfg": settings, "algorithm": preset["algorithm"]}, 1)


def _projections(hf: Any, quantization: Quantization) -> dict[str, int]:
    """The input features of each projection that is quantized, by the module's name."""
    check_exclusions([name for name, _ in hf.named_parameters()], quantization.exclude)
    embedding = hf.get_output_embeddings()
    linears = {
        name: module.in_features
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not embedding
        and find_exclusion(f"{name}.weight", quantization.exclude) is None
    }
    check_projections({f"{name}.weight": columns for name, columns in linears.items()}, quantization)
    return linears


def read_scales(hf: Any, quantization: Quantization) -> Calibration:
    """What ModelOpt has left in the modules of `hf`.

    Not by its export, which gives q, k and v a common scale that fits none of them.
    """
    input_scales, x_scales = {}, {}
    for name, module in hf.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        input_scale = getattr(quantizer, "pre_quant_scale", None)
        if input_scale is not None:
            input_scales[f"{name}.weight"] = _as_float32(input_scale).reshape(-1)
        largest = getattr(quantizer, "amax", None)
        if quantization.format != "int4" and largest is not None and largest > 0:
            step = _as_float32(largest).reshape(()) / largest_number(quantization.format)
            x_scales[f"{name}.weight"] = np.asarray(step, np.float32)
    return Calibration(input_scales, x_scales)


def _as_float32(tensor: torch.Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def pack_scales(calibration: Calibration) -> Scales:
    """All scales by names that tell them apart."""
    return {f"input:{name}": scale for name, scale in calibration.input_scales.items()} | {
        f"x:{name}": scale for name, scale in calibration.x_scales.items()
    }


def unpack_scales(scales: Scales) -> Calibration:
    """The reverse of `pack_scales`."""
    kinds: dict[str, dict[str, Any]] = {"input": {}, "x": {}}
    for key, scale in scales.items():
        kind, _, name = key.partition(":")
        kinds[kind][name] = scale
    return Calibration(kinds["input"], kinds["x"])

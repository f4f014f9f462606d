"""What checkpoints of quantized weights say of activations: rounded too, with which scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from trtforge.builder.quantization.checkpoint_module import Module
from trtforge.builder.quantization.weights import ActivationScheme, QuantizedLinear
from trtforge.plugins.op import Array

Config = Mapping[str, Any]

# What one is in rounded activations. The first name is of most formats, the second of transformers' own.
X_SCALE_PARTS = ("input_scale", "activation_scale")


def of_compressed_tensors(
    linear: QuantizedLinear | None, module: Module, config: Config
) -> QuantizedLinear | None:
    """A weight with the `input_activations` of all groups of the config, if they are symmetric bytes."""
    groups = (config.get("config_groups") or {}).values()
    inputs = [group.get("input_activations") or {} for group in groups]
    if any(of_group.get("num_bits") != 8 or not of_group.get("symmetric", True) for of_group in inputs):
        return linear
    are_dynamic = {bool(of_group.get("dynamic")) for of_group in inputs}
    if len(are_dynamic) != 1:
        return linear
    return _with(linear, module, "dynamic" if are_dynamic.pop() else "static")


def of_modelopt(linear: QuantizedLinear | None, module: Module, config: Config) -> QuantizedLinear | None:
    """A weight with static activations for `FP8`, dynamic ones for `FP8_PER_CHANNEL_PER_TOKEN`."""
    schemes: Mapping[str, ActivationScheme] = {"FP8": "static", "FP8_PER_CHANNEL_PER_TOKEN": "dynamic"}
    return _with(linear, module, schemes.get(str(config.get("quant_algo"))))


def of_fp8(linear: QuantizedLinear | None, module: Module, config: Config) -> QuantizedLinear | None:
    """A weight with the config's `activation_scheme`, which is dynamic if it is left out."""
    return _with(linear, module, "static" if config.get("activation_scheme") == "static" else "dynamic")


def _with(
    linear: QuantizedLinear | None, module: Module, scheme: ActivationScheme | None
) -> QuantizedLinear | None:
    if linear is None or scheme is None:
        return linear
    if scheme == "dynamic":
        return replace(linear, activations=scheme)
    part = next((part for part in X_SCALE_PARTS if module.get(part) is not None), None)
    if part is None or int(np.prod(module.need(part).shape)) != 1:
        return linear

    def read() -> Array:
        return module.read(part).astype(np.float32).reshape(())

    return replace(linear, activations=scheme, read_x_scale=read)

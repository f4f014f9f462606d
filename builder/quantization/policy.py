"""Which weights are quantized, and why the others are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from trtforge.builder.quantization.weights import ActivationScheme, QuantizedFormat, QuantizedLinear
from trtforge.errors import ConfigError
from trtforge.manifest import Runtime
from trtforge.plugins.int4_gemm.op import GROUP_SIZES

# What the graph of a runtime has for a quantized projection: standard operators before a Linear node, with
# zero points or with signed numbers, or the operators of this project.
Lowering = Literal["native", "signed", "plugin"]
LOWERINGS: dict[Runtime, Lowering] = {
    "openvino": "native",
    "reference": "plugin",
    "tensorrt": "plugin",
    "tensorrt-rtx": "signed",
}

_FORMATS: dict[Lowering, tuple[QuantizedFormat, ...]] = {
    "native": ("int4", "fp8", "int8"),
    "signed": ("int4", "fp8", "int8"),
    "plugin": ("int4", "fp8"),
}

# What rounds activations, too, to the format of the weights.
_SCHEMES: dict[tuple[Lowering, QuantizedFormat], tuple[ActivationScheme, ...]] = {
    ("native", "int8"): ("static",),
    ("signed", "fp8"): ("dynamic", "static"),
    ("signed", "int8"): ("dynamic", "static"),
    ("plugin", "fp8"): ("dynamic", "static"),
}

NOT_QUANTIZED = "not quantized in the checkpoint"

_REASONS: dict[tuple[Runtime, QuantizedFormat], str] = {
    ("openvino", "fp8"): "which multiplies no 8-bit floats",
    ("openvino", "int8"): "which rounds them by itself, a scale a token, in builds of --dtype bfloat16",
}

Scales = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a model showed that read texts, by the names of weights."""

    # What inputs of a projection are multiplied by, [in], and its weight's columns divided.
    input_scales: Scales = field(default_factory=dict)
    # What one is in activations that are rounded to the weight's format, [].
    x_scales: Scales = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a build quantizes weights that are not quantized yet."""

    format: QuantizedFormat
    group_size: int = max(GROUP_SIZES)  # of int4: input features that share a scale, at most
    exclude: tuple[str, ...] = ()  # fnmatch patterns of weights that stay as they are
    calibration_sha256: str | None = None  # of the texts that the model reads; None: no calibration


@dataclass(frozen=True, slots=True)
class WeightPolicy:
    """What is wanted of all weights of a graph, and how it is expressed."""

    lowering: Lowering
    quantization: Quantization | None = None  # None: weights stay as the checkpoint has them
    activations: ActivationScheme | None = None  # None: what is multiplied by weights is not rounded
    calibration: Calibration = field(default_factory=Calibration)


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """What became of one weight. `kind` is its dtype, such as bfloat16, if it was not quantized."""

    name: str
    shape: tuple[int, ...]
    kind: str
    group_size: int | None  # of int4
    reason: str
    bytes_before: int
    bytes_after: int  # with scales

    @property
    def is_quantized(self) -> bool:
        """Whether the graph has it quantized."""
        return self.kind in get_args(QuantizedFormat)

    @property
    def label(self) -> str:
        """The kind, with the size of groups if there are any."""
        return self.kind if self.group_size is None else f"{self.kind}, groups of {self.group_size}"


def choose_lowering(runtime: Runtime, wanted: QuantizedFormat | None) -> Lowering:
    """How quantized projections are expressed for `runtime`.

    Raises ConfigError if `wanted` (None: whatever the checkpoint holds) cannot be.
    """
    lowering = LOWERINGS.get(runtime)
    if lowering is None:
        raise ConfigError(
            f"quantized weights are not built for --runtime {runtime} yet: use --runtime openvino"
        )
    if wanted is not None and wanted not in _FORMATS[lowering]:
        raise ConfigError(
            f"--{wanted} cannot be built for --runtime {runtime}, which has no operator for such weights: "
            "use " + " or ".join(f"--{name}" for name in _FORMATS[lowering])
        )
    return lowering


def check_activations(runtime: Runtime, wanted: QuantizedFormat, activations: ActivationScheme) -> None:
    """Raises ConfigError if `runtime` cannot round activations to the format of the weights in that way."""
    possible = _SCHEMES.get((choose_lowering(runtime, wanted), wanted), ())
    if activations in possible:
        return
    others = [f"use --activations {scheme}" for scheme in possible]
    raise ConfigError(
        f"--activations {activations} cannot be built for {wanted} weights and --runtime {runtime}, "
        + _REASONS.get((runtime, wanted), "which has no such product")
        + f": {' or '.join([*others, 'leave it out'])}"
    )


def check_stored_activations(
    runtime: Runtime, activations: ActivationScheme, linears: Collection[QuantizedLinear]
) -> None:
    """Raises ConfigError unless some of a checkpoint's quantized weights, and none that `runtime` cannot
    express, are for activations that are rounded in that way."""
    found = [linear for linear in linears if linear.activations == activations]
    if not found:
        schemes = sorted({linear.activations or "none" for linear in linears})
        raise ConfigError(
            f"--activations {activations} does not fit this checkpoint, whose quantized weights say for "
            f"activations: {', '.join(schemes)}"
        )
    for wanted in sorted({linear.format for linear in found}):
        check_activations(runtime, wanted, activations)
    if LOWERINGS[runtime] == "signed" and any(linear.scales == "block" for linear in found):
        raise ConfigError(
            f"--activations {activations} cannot be built for weights with scales of blocks and --runtime "
            f"{runtime}, which has one scale for each token: leave it out"
        )


def choose_group_size(in_features: int, largest: int) -> int | None:
    """The largest group, up to `largest`, that divides `in_features`; None if there is none."""
    sizes = sorted(GROUP_SIZES, reverse=True)
    return next((size for size in sizes if size <= largest and in_features % size == 0), None)


def find_exclusion(name: str, patterns: Sequence[str]) -> str | None:
    """The first of `patterns` that `name` matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_exclusions(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raises ConfigError for a pattern that no weight of `names` matches: it has an error in it."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"--exclude {pattern!r} matches no weight of the model; they have names such as "
                f"{next(iter(names), 'nothing')}"
            )


def check_projections(in_features: Mapping[str, int], quantization: Quantization) -> None:
    """Raises ConfigError if `quantization` fits no projection; `in_features` has the columns of each."""
    option = f"--{quantization.format} can be applied to no weight of this model: "
    if not in_features:
        raise ConfigError(option + "it has no projections that are torch's Linear")
    left = {
        name: columns
        for name, columns in in_features.items()
        if find_exclusion(name, quantization.exclude) is None
    }
    if not left:
        raise ConfigError(option + "--exclude leaves out all of its projections")
    if quantization.format != "int4":
        return
    if all(choose_group_size(columns, quantization.group_size) is None for columns in left.values()):
        sizes = ", ".join(map(str, sorted(set(left.values()))))
        raise ConfigError(
            option + f"no projection's input features ({sizes}) are a multiple of {min(GROUP_SIZES)}, the "
            "smallest group; --int8 and --fp8 have a scale for each row"
        )

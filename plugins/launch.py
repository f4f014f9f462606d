"""What runs on a GPU for one node: which kernels, over which grids, with which arguments.

An operator's `launch.py` plans from shapes and dtypes alone. The same plan is compiled ahead of time, run by
the Triton language's interpreter, launched through the driver, and handed to TensorRT for its workspace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from trtforge.errors import PluginError
from trtforge.plugins.op import AttributeValue

Constant: TypeAlias = int | float | bool | str

WORKSPACE_ALIGNMENT = 256  # bytes, of every workspace within their one allocation

# What the Triton language calls the element types of tensors.
TRITON_TYPES: Mapping[str, str] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that a plan is for."""

    arch: int  # compute capability: 90 is sm_90
    num_sms: int


@dataclass(frozen=True, slots=True)
class Call:
    """A node's inputs and attributes. Tensors that a node leaves out are missing in `shapes`.

    Sizes that vary from step to step are -1 while kernels are chosen for a bundle, and known in a plan.
    """

    shapes: Mapping[str, tuple[int, ...]]  # by the names of the operator's declaration
    dtypes: Mapping[str, str]  # numpy's names, as in TRITON_TYPES
    attributes: Mapping[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of an operator's `kernel.py`, specialized: what one cubin holds."""

    operator: str  # the folder; with a dot in it, a package that is not one of trtforge's own
    function: str
    parameters: tuple[tuple[str, str], ...]  # name and type, in order: "*bf16" is a pointer; "i32", "fp32"
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int

    @property
    def module(self) -> str:
        """Where the function is defined."""
        package = self.operator if "." in self.operator else f"trtforge.plugins.{self.operator}"
        return f"{package}.kernel"

    @property
    def name(self) -> str:
        """Readable, and different for kernels that differ in anything."""
        return f"{self.function}-{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel over one grid.

    `arguments` holds for every parameter a number, or of a pointer the name of the tensor or workspace that
    it points to; None is a null pointer. Raises PluginError if they are not the kernel's parameters.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: Mapping[str, str | int | float | None]

    def __post_init__(self) -> None:
        expected = {name for name, _ in self.kernel.parameters}
        if expected != self.arguments.keys():
            raise PluginError(
                f"{self.kernel.function} takes {sorted(expected)}, not {sorted(self.arguments)}"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """Launches in order, and the scratch memory that they share: bytes by name."""

    launches: tuple[Launch, ...]
    workspace: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Kernels:
    """How an operator runs on a GPU."""

    # The launches of a call whose shapes are all known. Raises PluginError for what the kernels cannot do.
    # A larger call needs no less workspace than a smaller one, which also runs in it.
    plan: Callable[[Call, Gpu], Plan]
    # Every kernel that `plan` may choose for calls like this one on this compute capability.
    choices: Callable[[Call, int], tuple[Kernel, ...]]


def workspace_layout(plan: Plan) -> tuple[dict[str, int], int]:
    """Where each workspace of `plan` begins in their one allocation, and its size; both in bytes."""
    offsets: dict[str, int] = {}
    size = 0
    for name, num_bytes in plan.workspace.items():
        offsets[name] = size
        size += -(-num_bytes // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
    return offsets, size

"""All that there is of one operator, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trtforge.plugins.body import WriteBody
from trtforge.plugins.launch import Kernels
from trtforge.plugins.op import OpSpec


@dataclass(frozen=True, slots=True)
class Operator:
    """A declaration, what it means, and how it runs."""

    spec: OpSpec
    # Arrays in the order of the declared inputs, attributes by name; returns the outputs (one: no tuple).
    reference: Callable[..., Any]
    write_body: WriteBody
    kernels: Kernels | None = None  # None: native layers of every runtime do it

"""What tests of kernels share: the interpreter, mended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Here and not through fixtures alone: processes that compile kernels of these tests get this path too.
sys.path.append(str(Path(__file__).parent))

from kernel_harness import float_types, memory
from kernel_harness.interpret import interpret as interpret_operator

from trtforge.plugins.op import Array

float_types.install()
memory.install()


@pytest.fixture(scope="session")
def interpret() -> Callable[..., tuple[Array, ...]]:
    """`interpret(operator, inputs, attributes, gpu=Gpu(90, 132))`; see kernel_harness.interpret."""
    return interpret_operator

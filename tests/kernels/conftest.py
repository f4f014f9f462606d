"""What tests of kernels share: the interpreter, mended, and the compiler."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import pytest

# Here and not through fixtures alone: processes that compile kernels of these tests get this path too.
sys.path.append(str(Path(__file__).parent))

from kernel_harness import float_types, memory
from kernel_harness.interpret import interpret as interpret_operator
from kernel_harness.sass import Sass, disassemble

from trtforge.plugins.aot import compile_kernel, compiler
from trtforge.plugins.launch import Kernel
from trtforge.plugins.op import Array

float_types.install()
memory.install()


@pytest.fixture(scope="session")
def interpret() -> Callable[..., tuple[Array, ...]]:
    """`interpret(operator, inputs, attributes, gpu=Gpu(90, 132))`; see kernel_harness.interpret."""
    return interpret_operator


@pytest.fixture(scope="session")
def kernel_compiler() -> Iterator[Executor]:
    """One process for `compile_kernel`, with a cache that is kept in the checkout between runs."""
    with compiler(num_processes=1, cache=Path(__file__).parents[2] / ".cache" / "triton") as pool:
        yield pool


@pytest.fixture(scope="session")
def sass_of(kernel_compiler: Executor) -> Callable[[Kernel, int], Sass]:
    """`sass_of(kernel, arch)`: its machine code; each is compiled once."""

    @functools.cache
    def sass(kernel: Kernel, arch: int) -> Sass:
        return disassemble(kernel_compiler.submit(compile_kernel, kernel, arch).result().cubin)

    return sass

"""The kernels of a known model for all architectures, compiled as a user does it."""

from __future__ import annotations

import pytest

from trtforge.builder.kernels_command import compile_kernels
from trtforge.plugins.bundle import ARCHS, Bundle
from trtforge.plugins.examples import EXAMPLES
from trtforge.plugins.graph_calls import kernels_for

OPERATORS_OF_LLAMA = {"fp8_gemm", "int4_gemm", "paged_attention"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("llama-8b") / "kernels"
    compile_kernels(output=folder, example="llama-8b")
    return Bundle.load(folder)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_of_llama_8b_is_compiled(bundle: Bundle, arch: int) -> None:
    kernels = kernels_for(EXAMPLES["llama-8b"], arch)
    assert {kernel.operator for kernel in kernels} == OPERATORS_OF_LLAMA
    for kernel in kernels:
        entry, cubin = bundle.cubin(kernel, arch)
        assert entry.parameters == kernel.parameters
        assert cubin.startswith(b"\x7fELF")

"""What the tests of kernels read out of machine code is there when it should be, and not when not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kernel_harness.sass import Sass
from kernel_harness.scaled_add.launch import choices

from trtforge.plugins.launch import Call, Kernel

SassOf = Callable[[Kernel, int], Sass]


def small_gemm(
    dtype: str = "fp16", block_m: int = 64, block_n: int = 64, num_warps: int = 4, num_stages: int = 3
) -> Kernel:
    return Kernel(
        operator="kernel_harness.small_gemm",
        function="small_gemm",
        parameters=(
            ("out", "*fp32"),
            ("a", f"*{dtype}"),
            ("b", f"*{dtype}"),
            ("num_columns", "i32"),
            ("num_steps", "i32"),
        ),
        constants=(("BLOCK_M", block_m), ("BLOCK_N", block_n), ("BLOCK_K", 64)),
        num_warps=num_warps,
        num_stages=num_stages,
    )


@pytest.mark.parametrize(
    ("arch", "opcode"), [(80, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
)
def test_tensor_cores(sass_of: SassOf, arch: int, opcode: str) -> None:
    sass = sass_of(small_gemm(), arch)
    assert sass.main_loop.count(opcode) == sass.main_loop.tensor_core_instructions > 0
    assert sass.spills == sass.stack_bytes == 0
    assert 32 < sass.registers <= 255


def test_stages_keep_copies_in_flight(sass_of: SassOf) -> None:
    flight = {}
    for num_stages in (1, 3, 4):
        loop = sass_of(small_gemm(num_stages=num_stages), 80).main_loop
        flight[num_stages] = loop.groups_in_flight
        assert (loop.committed_groups > 0) == (num_stages > 1)
        assert loop.wide_loads > 0
        assert loop.narrow_loads == 0
    assert 0 == flight[1] < flight[3] < flight[4]


def test_byte_permutations_in_a_loop(sass_of: SassOf) -> None:
    # Tensor cores read 8-bit operands along K alone: b is transposed byte by byte.
    assert sass_of(small_gemm(dtype="fp8e4nv", num_stages=1), 90).main_loop.opcodes["PRMT"] > 0
    assert sass_of(small_gemm(), 90).main_loop.opcodes["PRMT"] == 0


def test_narrow_loads_outside_of_any_loop(sass_of: SassOf) -> None:
    call = Call({"total": (-1, 64)}, {"total": "bfloat16"}, {"scale": 1.0})
    for kernel in choices(call, 90):  # its masks keep neighbours from being loaded together
        sass = sass_of(kernel, 90)
        assert sass.narrow_loads > 0
        assert sass.wide_loads == 0
        assert sass.loops == ()


def test_too_large_tiles_spill(sass_of: SassOf) -> None:
    assert sass_of(small_gemm(block_n=128, num_warps=1, num_stages=1), 80).spills > 0

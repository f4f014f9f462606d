"""What the machine code of PagedAttention's kernels has to show: none of it is seen in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import pytest
from kernel_harness.sass import Sass

from trtforge.plugins.aot import compile_kernel
from trtforge.plugins.bundle import max_shared_bytes
from trtforge.plugins.launch import Call, Kernel
from trtforge.plugins.paged_attention.launch import choices

SassOf = Callable[[Kernel, int], Sass]


def kernels(arch: int, cache_dtype: str, head_dim: int = 128) -> dict[str, Kernel]:
    """Of the attention layers of Llama 3.1 8B."""
    step = ("block_tables", "cu_seqlens", "context_lens", "slot_mapping")
    shapes = {
        "q": (-1, 32, head_dim),
        "k": (-1, 8, head_dim),
        "v": (-1, 8, head_dim),
        "kv_cache": (-1, 2, 64, 8, head_dim),
        **{name: (-1, -1) if name == "block_tables" else (-1,) for name in step},
    }
    dtypes = dict.fromkeys("qkv", "bfloat16") | {"kv_cache": cache_dtype} | dict.fromkeys(step, "int32")
    if cache_dtype != "bfloat16":
        shapes |= {"k_scale": (1,), "v_scale": (1,)}
        dtypes |= {"k_scale": "float32", "v_scale": "float32"}
    call = Call(shapes, dtypes, {"scale": 0.1, "window": 0, "softcap": 0.0})
    return {
        kernel.function + ("_split" if dict(kernel.constants).get("SPLIT") else ""): kernel
        for kernel in choices(call, arch)
    }


def check_shared_memory(kernel_compiler: Executor, kernel: Kernel, arch: int) -> None:
    """It has to suffice on every GPU that runs this architecture's machine code: 8.6 has less than 8.0."""
    entry = kernel_compiler.submit(compile_kernel, kernel, arch).result().entry
    assert entry.shared_bytes <= max_shared_bytes(86 if arch == 80 else arch)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["decode_split", "prefill"])
def test_hopper(sass_of: SassOf, kernel_compiler: Executor, name: str, cache_dtype: str) -> None:
    kernel = kernels(90, cache_dtype)[name]
    check_shared_memory(kernel_compiler, kernel, 90)
    sass = sass_of(kernel, 90)
    # Large tiles cost a few registers, and have been measured to be faster for all that.
    assert sass.spills <= 40
    loop = sass.main_loop
    constants = dict(kernel.constants)
    tile_bytes = constants["TILE"] * constants["DIMS"] * (2 if cache_dtype == "bfloat16" else 1)
    wide_loads = tile_bytes // (16 * 32 * kernel.num_warps)
    if (name, cache_dtype) == ("decode_split", "float8_e4m3fn"):
        # Values come in pieces, each to the thread that multiplies it; tiles of 64 rows, which load 16 bytes
        # of them at once, have been measured to be slower.
        assert loop.wide_loads >= wide_loads
    else:  # keys and values, 16 bytes a thread; block numbers are the only other load
        assert loop.wide_loads == 2 * wide_loads
        assert loop.narrow_loads <= 1
    if name == "prefill":
        assert loop.count("HGMMA") > 0
    else:
        assert loop.count("HMMA") > 0
    if (name, cache_dtype) != ("decode_split", "bfloat16"):  # it has one buffer, and other programs beside it
        assert loop.groups_in_flight >= 2  # the next keys and values, while these are multiplied
    if cache_dtype != "bfloat16":
        elements = 2 * constants["TILE"] * constants["DIMS"] // (32 * kernel.num_warps)
        assert loop.count("F2FP.E4M3.UNPACK_B") == elements // 2  # two at once
        assert loop.opcodes["I2F"] == 0
        assert loop.opcodes["PRMT"] <= elements // 4


@pytest.mark.parametrize("arch", [80, 89, 100, 120])
@pytest.mark.parametrize("name", ["decode_split", "prefill"])
def test_other_architectures(sass_of: SassOf, kernel_compiler: Executor, name: str, arch: int) -> None:
    kernel = kernels(arch, "float8_e4m3fn")[name]
    check_shared_memory(kernel_compiler, kernel, arch)
    sass = sass_of(kernel, arch)
    assert sass.spills == 0
    assert sass.tensor_core_instructions > 0


def test_the_widest_heads(sass_of: SassOf, kernel_compiler: Executor) -> None:
    kernel = kernels(80, "bfloat16", head_dim=256)["prefill"]
    check_shared_memory(kernel_compiler, kernel, 80)
    assert sass_of(kernel, 80).spills == 0


def test_rows_of_several_chunks_compile(sass_of: SassOf) -> None:
    kernel = kernels(90, "bfloat16", head_dim=256)["append"]
    constants = dict(kernel.constants)
    assert constants["NUM_KV_HEADS"] * constants["HEAD_DIM"] > constants["CHUNK"]
    assert sass_of(kernel, 90).count("STG") > 0

"""Times kernels with other tiles than those that `launch.py` chooses, for choosing them.

Kernels can be compiled before, on a machine without a GPU; both take the groups to do, all by default.

    PYTHONPATH=src:benchmarks python -m gpu.tune compile FOLDER [GROUP ...]
    PYTHONPATH=src:benchmarks python -m gpu.tune time FOLDER [GROUP ...]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from gpu.attention import ATTENTION_CALLS, ATTRIBUTES, Step, time_step
from gpu.gemm import GEMM_CALLS, SHAPES, VARIANTS, Variant, time_variant

from trtforge.errors import PluginError
from trtforge.plugins.aot import write_bundle
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.fp8_gemm import launch as fp8_launch
from trtforge.plugins.graph_calls import kernels_for
from trtforge.plugins.int4_gemm import launch as int4_launch
from trtforge.plugins.launch import Call, Kernel
from trtforge.plugins.launcher import Launcher
from trtforge.plugins.operators import OPERATORS
from trtforge.plugins.paged_attention import launch as attention_launch
from trtforge.plugins.paged_attention.launch import Tiles
from trtforge.runtime.executors.kernel_calls import KernelCalls

ARCH = 90
Time = Callable[[Launcher], float]  # seconds


@dataclass(frozen=True, slots=True)
class Group:
    """Problems, and the values of a launch module that they are timed with."""

    module: ModuleType
    calls: Sequence[tuple[str, Call]]
    variants: Mapping[str, Mapping[str, Any]]
    problems: Mapping[str, Time]


def _tiles(*candidates: Tiles, attribute: str) -> dict[str, dict[str, Any]]:
    return {
        f"rows {tiles.rows}, tile {tiles.tile}, warps {tiles.num_warps}, stages {tiles.num_stages}": {
            attribute: lambda *_, tiles=tiles: tiles
        }
        for tiles in candidates
    }


def _attention(launcher: Launcher, step: Step) -> float:
    operator = OPERATORS["PagedAttention"]
    if operator.kernels is None:
        raise TypeError("PagedAttention has no kernels")
    return time_step(step, KernelCalls(operator.spec, operator.kernels, ATTRIBUTES, launcher))


def _steps(dtype: torch.dtype, *steps: tuple[int, int, int]) -> dict[str, Time]:
    return {
        f"{num_seqs} x {new} of {context}": partial(_attention, step=Step(num_seqs, new, context, dtype))
        for num_seqs, new, context in steps
    }


def _product(launcher: Launcher, variant: Variant, num_tokens: int, shape: tuple[int, int]) -> float:
    return time_variant(variant, launcher, num_tokens, *shape)


def _products(name: str, *num_tokens: int) -> dict[str, Time]:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    return {
        f"{shape}, {tokens}": partial(_product, variant=variant, num_tokens=tokens, shape=SHAPES[shape])
        for shape in ("8B o", "8B gate and up")
        for tokens in num_tokens
    }


def _fp8_tiles(attribute: str, index: int, **changes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """One of the tiles replaced by others."""
    tiles = getattr(fp8_launch, attribute)
    variants = {}
    for values in product(*changes.values()):
        named = dict(zip(changes, values, strict=True))
        changed = replace(tiles[index], **named)
        variants[", ".join(f"{k} {v}" for k, v in named.items())] = {
            attribute: (*tiles[:index], changed, *tiles[index + 1 :])
        }
    return variants


BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DECODES = ((1, 1, 16384), (32, 1, 4096), (256, 1, 2048))
FP8_CALLS = {
    activation: [call for call in GEMM_CALLS if call[1].attributes.get("activation") == activation]
    for activation in ("none", "dynamic")
}
GROUPS: dict[str, Group] = {
    "decode": Group(
        attention_launch,
        ATTENTION_CALLS[:1],
        _tiles(
            *(Tiles(16, tile, 4, stages) for tile in (32, 64, 128) for stages in (4, 5, 6, 7)),
            *(Tiles(16, 64, warps, stages) for warps in (2, 8) for stages in (5, 7)),
            Tiles(16, 128, 8, 5),
            Tiles(64, 64, 4, 5),
            attribute="decode_tiles",
        ),
        _steps(BF16, *DECODES),
    ),
    "splits": Group(
        attention_launch,
        ATTENTION_CALLS[:1],
        {f"programs {n}": {"_PROGRAMS_PER_SM": n} for n in (1, 2, 3, 4, 6, 8)},
        _steps(BF16, (1, 1, 1024), (1, 1, 16384), (8, 1, 4096), (32, 1, 4096)),
    ),
    "decode-fp8": Group(
        attention_launch,
        ATTENTION_CALLS[1:2],
        _tiles(
            *(Tiles(rows, tile, 4, stages) for rows in (16, 64) for tile in (64, 128) for stages in (5, 7)),
            Tiles(64, 128, 8, 5),
            attribute="decode_tiles",
        ),
        _steps(FP8, *DECODES),
    ),
    "prefill": Group(
        attention_launch,
        ATTENTION_CALLS[:1],
        _tiles(
            *(Tiles(128, tile, 8, stages) for tile in (32, 64, 128) for stages in (3, 4, 5, 6)),
            *(Tiles(64, tile, 4, stages) for tile in (64, 128) for stages in (4, 5)),
            attribute="prefill_tiles",
        ),
        _steps(BF16, (1, 2048, 2048), (1, 8192, 8192)),
    ),
    "int4": Group(
        int4_launch,
        [call for call in GEMM_CALLS if call[0] == "Int4Gemm"],
        {
            f"blocks {blocks}, warps {warps}, stages {stages}": {
                "BLOCKS_PER_SM": blocks,
                "MULTIPLY_WARPS": warps,
                "MULTIPLY_STAGES": stages,
            }
            for blocks, warps, stages in product((2, 4, 8), (4, 8), (3, 4, 6))
        },
        _products("int4, groups of 128", 1, 16, 64),
    ),
    "fp8-weight": Group(
        fp8_launch,
        FP8_CALLS["none"],
        _fp8_tiles(
            "_TILES_16BIT",
            0,
            outputs=(64, 128),
            step=(64, 128, 256),
            num_stages=(3, 4, 6),
            programs_per_sm=(2, 4),
        ),
        _products("e4m3 weight", 1, 16),
    ),
    "fp8-both": Group(
        fp8_launch,
        FP8_CALLS["dynamic"],
        _fp8_tiles(
            "_TILES_FP8",
            0,
            outputs=(64, 128),
            step=(128, 256),
            num_stages=(3, 5, 7),
            programs_per_sm=(2, 4),
        ),
        _products("e4m3 both", 1, 16),
    ),
    "fp8-many": Group(
        fp8_launch,
        FP8_CALLS["dynamic"],
        _fp8_tiles(
            "_TILES_FP8", 3, tokens=(128, 256), outputs=(64, 128), num_stages=(3, 4), num_warps=(4, 8)
        ),
        _products("e4m3 both", 512, 2048),
    ),
}


def kernels(names: Sequence[str]) -> list[Kernel]:
    """Of all variants of these groups."""
    found: dict[str, Kernel] = {}
    for name in names:
        for values in GROUPS[name].variants.values():
            with patch.multiple(GROUPS[name].module, **values):
                found |= {kernel.name: kernel for kernel in kernels_for(GROUPS[name].calls, ARCH)}
    return list(found.values())


def report(folder: Path, names: Sequence[str]) -> None:
    """A table for each group: microseconds by variant and problem."""
    launcher = Launcher(Bundle.load(folder))
    for name in names:
        group = GROUPS[name]
        print(f"\n{name}: µs of {', '.join(group.problems)}", flush=True)
        for variant, values in group.variants.items():
            with patch.multiple(group.module, **values):
                times = [_microseconds(problem, launcher) for problem in group.problems.values()]
            print(f"{variant:<50}", *(f"{time:>9}" for time in times), flush=True)


def _microseconds(problem: Time, launcher: Launcher) -> str:
    try:
        return f"{1e6 * problem(launcher):.1f}"
    except PluginError as error:  # not compiled: it needs more shared memory than there is
        return str(error)[:9]


def main() -> None:
    """Compile or time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("compile", "time"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    arguments = parser.parse_args()
    names = arguments.groups or list(GROUPS)
    if arguments.action == "compile":
        num_processes = os.cpu_count() or 1
        write_bundle({ARCH: kernels(names)}, arguments.folder, num_processes=num_processes, on_refused=print)
    else:
        report(arguments.folder, names)


if __name__ == "__main__":
    main()

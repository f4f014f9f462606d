"""How Int4Gemm is launched.

Few tokens: one kernel that dequantizes the weight on its way to the tensor cores, over splits of the inputs
where there are too few tiles to fill the GPU, and one that adds the splits up. Many tokens: the weight is
dequantized once, in slices, and multiplied like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtforge.errors import PluginError
from trtforge.plugins.int4_gemm.op import STEP, TILE, group_size, packed_shape
from trtforge.plugins.launch import TRITON_TYPES, Call, Constant, Gpu, Kernel, Launch, Plan

# Tokens up to which the weight is dequantized by every block of tokens that needs it.
LARGEST_FUSED = 256
# Tokens of a block: the first that holds all, or else the last.
TOKEN_BLOCKS = (16, 32, 64)
# Blocks that should run on an SM at once: together they keep enough loads in flight.
BLOCKS_PER_SM = 8
# These and the number above are the fastest of those measured on an H200 (docs/gpu.md).
MULTIPLY_WARPS, MULTIPLY_STAGES = 4, 3
SMALLEST_SPLIT = 4  # steps, so that the loads of a split overlap
SLICE_BYTES = 256 << 20  # of dequantized weight at a time
ELEMENTS = 1024  # of a block of the kernels that only move or add
BLOCK_M, BLOCK_K = 128, 64  # of the product with a dequantized weight
WIDE, NARROW = 256, 128  # its BLOCK_N
# Compute capabilities that have 99 KiB of shared memory for a block.
LITTLE_SHARED_MEMORY = (86, 89, 120)


@dataclass(frozen=True, slots=True)
class _Problem:
    """A call, checked."""

    num_tokens: int  # -1: any
    out_features: int
    in_features: int
    group: int  # columns that share a scale; 0: all
    dtype: str  # Triton's name
    has_bias: bool
    has_perm: bool

    @property
    def tiles(self) -> int:
        return -(-self.out_features // TILE)

    @property
    def steps(self) -> int:
        return -(-self.in_features // STEP)


def plan(call: Call, gpu: Gpu) -> Plan:
    """Raises PluginError for dtypes and sizes that the kernels do not take."""
    problem = _check(call)
    if problem.num_tokens == 0:
        return Plan((), {})
    launches = []
    workspace = {}
    x = "x"
    if problem.has_perm:
        x = "sorted_x"
        workspace[x] = 2 * problem.num_tokens * problem.in_features
        launches.append(_gather(problem))
    if problem.num_tokens <= LARGEST_FUSED:
        rest = _plan_fused(problem, gpu, x)
    else:
        rest = _plan_dequantized(problem, gpu, x)
    return Plan((*launches, *rest.launches), workspace | dict(rest.workspace))


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    """Raises PluginError like `plan`."""
    problem = _check(call)
    kernels = [_gather_kernel(problem)] if problem.has_perm else []
    for block_m in TOKEN_BLOCKS:
        kernels.append(_multiply_kernel(problem, block_m, split=False))
        if problem.steps >= 2 * SMALLEST_SPLIT:
            kernels.append(_multiply_kernel(problem, block_m, split=True))
    if problem.steps >= 2 * SMALLEST_SPLIT:
        kernels.append(_add_splits_kernel(problem))
    kernels.append(_dequantize_kernel(problem))
    kernels += [_matmul_kernel(problem, block_n) for block_n in _matmul_widths(arch)]
    return tuple(kernels)


def _check(call: Call) -> _Problem:
    dtype, dtypes = call.dtypes["x"], ("float16", "bfloat16")
    if dtype not in dtypes:
        raise PluginError(f"Int4Gemm: x is {dtype}; its kernels take {dtypes}")
    if call.dtypes["scales"] != dtype or call.dtypes.get("bias", dtype) != dtype:
        raise PluginError(f"Int4Gemm: scales and bias must be {dtype} as x is, not {dict(call.dtypes)}")
    num_tokens, in_features = call.shapes["x"]
    num_groups, out_features, _ = call.shapes["scales"]
    size = group_size(in_features, num_groups)
    if call.shapes["weight"] != packed_shape(out_features, in_features):
        raise PluginError(
            f"Int4Gemm: a weight of {out_features} x {in_features} is stored as "
            f"{packed_shape(out_features, in_features)}, not {call.shapes['weight']}"
        )
    return _Problem(
        num_tokens=num_tokens,
        out_features=out_features,
        in_features=in_features,
        group=0 if num_groups == 1 else size,
        dtype=TRITON_TYPES[dtype],
        has_bias="bias" in call.shapes,
        has_perm="perm" in call.shapes,
    )


def _plan_fused(problem: _Problem, gpu: Gpu, x: str) -> Plan:
    num_tokens = problem.num_tokens
    block_m = next((size for size in TOKEN_BLOCKS if num_tokens <= size), TOKEN_BLOCKS[-1])
    token_blocks = -(-num_tokens // block_m)
    num_splits, rows = _splits(problem, gpu, token_blocks)
    steps_per_split = -(-problem.steps // num_splits)
    num_splits = -(-problem.steps // steps_per_split)
    split = num_splits > 1
    multiply = Launch(
        kernel=_multiply_kernel(problem, block_m, split),
        grid=(token_blocks, problem.tiles, num_splits),
        arguments={
            "y": None if split else "y",
            "partial_sums": "partial_sums" if split else None,
            "x": x,
            "weight": "weight",
            "scales": "scales",
            "bias": "bias" if problem.has_bias and not split else None,
            "num_tokens": num_tokens,
            "out_features": problem.out_features,
            "in_features": problem.in_features,
            "steps_per_split": steps_per_split,
        },
    )
    workspace = {"partial_sums": 4 * problem.tiles * TILE * rows} if rows else {}
    if not split:
        return Plan((multiply,), workspace)
    add = Launch(
        kernel=_add_splits_kernel(problem),
        grid=(num_tokens, -(-problem.out_features // ELEMENTS), 1),
        arguments={
            "y": "y",
            "partial_sums": "partial_sums",
            "bias": "bias" if problem.has_bias else None,
            "num_tokens": num_tokens,
            "out_features": problem.out_features,
            "num_splits": num_splits,
        },
    )
    return Plan((multiply, add), workspace)


def _splits(problem: _Problem, gpu: Gpu, token_blocks: int) -> tuple[int, int]:
    """Splits that are worth it, at least 1, and the most rows of partial sums for so many tokens or fewer.

    The workspace is as large as that: a larger call, though it be split less, has to need no less of it.
    """
    wanted = BLOCKS_PER_SM * gpu.num_sms // problem.tiles
    # Partial sums, 4 bytes written and read, should not move more than the weight, half a byte a value.
    largest_rows = problem.in_features // 16
    most = problem.steps // SMALLEST_SPLIT
    if min(wanted, most) < 2:
        return 1, 0
    num_splits = max(1, min(wanted // token_blocks, largest_rows // problem.num_tokens, most))
    return num_splits, min(wanted * TOKEN_BLOCKS[-1], largest_rows, most * problem.num_tokens)


def _plan_dequantized(problem: _Problem, gpu: Gpu, x: str) -> Plan:
    row_bytes = 2 * problem.steps * STEP
    slice_rows = min(max(1, SLICE_BYTES // row_bytes // WIDE) * WIDE, -(-problem.out_features // WIDE) * WIDE)
    token_blocks = -(-problem.num_tokens // BLOCK_M)
    # Narrow blocks where wide ones would leave SMs idle.
    widths = _matmul_widths(gpu.arch)
    block_n = widths[0] if token_blocks * (slice_rows // widths[0]) >= gpu.num_sms else widths[-1]
    launches = []
    for start in range(0, problem.out_features, slice_rows):
        end = min(start + slice_rows, problem.out_features)
        sizes = {"out_features": problem.out_features, "in_features": problem.in_features}
        dequantize = Launch(
            kernel=_dequantize_kernel(problem),
            grid=(problem.steps, -(-(end - start) // TILE), 1),
            arguments={
                "dequantized": "dequantized",
                "weight": "weight",
                "scales": "scales",
                "first_tile": start // TILE,
                **sizes,
            },
        )
        matmul = Launch(
            kernel=_matmul_kernel(problem, block_n),
            grid=(token_blocks, -(-(end - start) // block_n), 1),
            arguments={
                "y": "y",
                "x": x,
                "dequantized": "dequantized",
                "bias": "bias" if problem.has_bias else None,
                "num_tokens": problem.num_tokens,
                "first_block": start // block_n,
                **sizes,
            },
        )
        launches += [dequantize, matmul]
    return Plan(tuple(launches), {"dequantized": row_bytes * slice_rows})


def _gather(problem: _Problem) -> Launch:
    return Launch(
        kernel=_gather_kernel(problem),
        grid=(problem.num_tokens, -(-problem.in_features // ELEMENTS), 1),
        arguments={"sorted_x": "sorted_x", "x": "x", "perm": "perm", "in_features": problem.in_features},
    )


def _multiply_kernel(problem: _Problem, block_m: int, split: bool) -> Kernel:
    return _kernel(
        problem,
        "multiply",
        {
            "GROUP": problem.group,
            "BLOCK_M": block_m,
            "SPLIT": split,
            "HAS_BIAS": problem.has_bias and not split,
            "NUM_STAGES": MULTIPLY_STAGES,
        },
        num_warps=MULTIPLY_WARPS,
        num_stages=MULTIPLY_STAGES,
    )


def _add_splits_kernel(problem: _Problem) -> Kernel:
    return _kernel(problem, "add_splits", {"BLOCK": ELEMENTS, "HAS_BIAS": problem.has_bias})


def _gather_kernel(problem: _Problem) -> Kernel:
    return _kernel(problem, "gather_columns", {"BLOCK": ELEMENTS})


def _dequantize_kernel(problem: _Problem) -> Kernel:
    return _kernel(problem, "dequantize", {"GROUP": problem.group})


def _matmul_widths(arch: int) -> tuple[int, ...]:
    return (NARROW,) if arch in LITTLE_SHARED_MEMORY else (WIDE, NARROW)


def _matmul_kernel(problem: _Problem, block_n: int) -> Kernel:
    constants = {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": block_n,
        "BLOCK_K": BLOCK_K,
        "ALIGNED": problem.out_features % 16 == 0,
        "HAS_BIAS": problem.has_bias,
    }
    return _kernel(problem, "matmul", constants, num_warps=8, num_stages=4)


# Pointers and int32 numbers that a kernel takes, in order.
_PARAMETERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "multiply": (
        ("y", "partial_sums", "x", "weight", "scales", "bias"),
        ("num_tokens", "out_features", "in_features", "steps_per_split"),
    ),
    "add_splits": (("y", "partial_sums", "bias"), ("num_tokens", "out_features", "num_splits")),
    "gather_columns": (("sorted_x", "x", "perm"), ("in_features",)),
    "dequantize": (("dequantized", "weight", "scales"), ("out_features", "in_features", "first_tile")),
    "matmul": (
        ("y", "x", "dequantized", "bias"),
        ("num_tokens", "out_features", "in_features", "first_block"),
    ),
}
# What is not of x's dtype. A scale and its zero point are loaded at once, as a word.
_ELEMENT_TYPES: Mapping[str, str] = {"weight": "i32", "scales": "i32", "perm": "i32", "partial_sums": "fp32"}


def _kernel(
    problem: _Problem,
    function: str,
    constants: Mapping[str, Constant],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
) -> Kernel:
    pointer_names, number_names = _PARAMETERS[function]
    return Kernel(
        operator="int4_gemm",
        function=function,
        parameters=(
            *((name, f"*{_ELEMENT_TYPES.get(name, problem.dtype)}") for name in pointer_names),
            *((name, "i32") for name in number_names),
        ),
        constants=tuple(constants.items()),
        num_warps=num_warps,
        num_stages=num_stages,
    )

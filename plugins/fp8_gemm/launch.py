"""Which kernels compute Fp8Gemm.

The tiles follow from what the machine code needs to keep loads in flight without spilling registers. Those
for 16 tokens are the fastest of those measured on an H200 (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from trtforge.errors import PluginError
from trtforge.plugins.fp8_gemm.op import SCALE_BLOCK, check_activation, scale_shape
from trtforge.plugins.launch import TRITON_TYPES, Call, Constant, Gpu, Kernel, Launch, Plan

MAX_SPLITS = 16
_MIN_STEPS = 4  # of a split, fewer would not fill the pipeline
_REDUCE_BLOCK = 128
_ROW_BLOCK = 8192  # inputs of a token that are quantized at once
_BLOCKS = 8  # of 128 inputs of a token, quantized by one program


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: tokens x outputs, in steps over the inputs."""

    tokens: int
    outputs: int
    step: int  # at most 128: it has one scale of a block, and sums of e4m3 lose digits in longer ones
    num_stages: int
    programs_per_sm: int  # that fit at once: splitting beyond it would only cost
    num_warps: int = 4


# The first whose tokens suffice, else the last. A larger one has at least as many partial sums.
_TILES_16BIT = (
    Tile(16, 128, 128, 4, programs_per_sm=2),
    Tile(32, 64, 128, 4, programs_per_sm=3),
    Tile(64, 64, 64, 4, programs_per_sm=3),
    Tile(128, 64, 64, 4, programs_per_sm=2),
)
_TILES_FP8 = (
    Tile(16, 128, 128, 5, programs_per_sm=2),
    Tile(32, 64, 128, 4, programs_per_sm=4),
    Tile(64, 64, 128, 3, programs_per_sm=3),
    Tile(128, 64, 128, 3, programs_per_sm=2),
)


def plan(call: Call, gpu: Gpu) -> Plan:
    """Quantize the activations if asked to, multiply, and add up the splits if there are any.

    Raises PluginError for dtypes, shapes and attributes that the kernels do not have.
    """
    num_tokens, out_features, in_features = _sizes(call)
    tile = next((t for t in _tiles(call, gpu.arch) if num_tokens <= t.tokens), _tiles(call, gpu.arch)[-1])
    launches = []
    # Enough for every number of tokens that gets this tile or a smaller one.
    workspace = {"partial": 4 * tile.programs_per_sm * gpu.num_sms * tile.tokens * tile.outputs}
    x, x_scale = "x", None
    if call.attributes["activation"] != "none":
        launches.append(_quantize(call, gpu.arch))
        x, x_scale = "values", "x_scale"
        workspace["values"] = num_tokens * in_features * (1 if _multiplies_fp8(call, gpu.arch) else 2)
        if call.attributes["activation"] == "dynamic":
            x_scale = "scales"
            workspace["scales"] = 4 * num_tokens * _scales_of_a_token(call)
    steps = -(-in_features // tile.step)
    programs = -(-num_tokens // tile.tokens) * -(-out_features // tile.outputs)
    wanted = tile.programs_per_sm * gpu.num_sms // max(1, programs)
    steps_per_split = -(-steps // max(1, min(MAX_SPLITS, wanted, steps // _MIN_STEPS)))
    splits = -(-steps // steps_per_split)
    bias = "bias" if "bias" in call.shapes else None
    launches.append(
        Launch(
            _gemm(call, gpu.arch, tile, split=splits > 1),
            (-(-num_tokens // tile.tokens), -(-out_features // tile.outputs), splits),
            {
                "y": "y",
                "partial": "partial" if splits > 1 else None,
                "x": x,
                "x_scale": x_scale,
                "weight": "weight",
                "scale": "scale",
                "bias": bias,
                "num_tokens": num_tokens,
                "out_features": out_features,
                "in_features": in_features,
                "steps_per_split": steps_per_split,
            },
        )
    )
    if splits > 1:
        launches.append(
            Launch(
                _add_splits(call),
                (-(-out_features // _REDUCE_BLOCK), num_tokens, 1),
                {
                    "y": "y",
                    "partial": "partial",
                    "bias": bias,
                    "out_features": out_features,
                    "splits": splits,
                },
            )
        )
    return Plan(tuple(launches), workspace)


def choices(call: Call, arch: int) -> tuple[Kernel, ...]:
    """Every kernel that `plan` may choose for any number of tokens."""
    _sizes(call)
    gemms = [_gemm(call, arch, tile, split) for tile in _tiles(call, arch) for split in (False, True)]
    quantize = [] if call.attributes["activation"] == "none" else [_quantize(call, arch).kernel]
    return (*quantize, *gemms, _add_splits(call))


def _sizes(call: Call) -> tuple[int, int, int]:
    """Tokens, out_features and in_features."""
    num_tokens, in_features = call.shapes["x"]
    out_features = call.shapes["weight"][0]
    if call.dtypes["x"] not in ("float16", "bfloat16") or call.dtypes["weight"] != "float8_e4m3fn":
        raise PluginError(
            f"Fp8Gemm runs with x float16 or bfloat16 and weight float8_e4m3fn, not {call.dtypes['x']} and "
            f"{call.dtypes['weight']}"
        )
    if call.shapes["weight"] != (out_features, in_features):
        raise PluginError(f"Fp8Gemm: weight {call.shapes['weight']} does not fit x {call.shapes['x']}")
    if in_features % 16:
        raise PluginError(f"Fp8Gemm has {in_features} in_features, which is no multiple of 16")
    expected = scale_shape(call.attributes["scales"], out_features, in_features)
    if call.shapes["scale"] != expected:
        raise PluginError(f"Fp8Gemm: scale has shape {call.shapes['scale']}, expected {expected}")
    check_activation(call.attributes["activation"], "x_scale" in call.shapes)
    return num_tokens, out_features, in_features


def _multiplies_fp8(call: Call, arch: int) -> bool:
    """Otherwise e4m3 becomes 16 bits before it is multiplied, which changes no value."""
    return call.attributes["activation"] != "none" and arch >= 89


def _scales_of_a_token(call: Call) -> int:
    return -(-call.shapes["x"][-1] // SCALE_BLOCK) if call.attributes["scales"] == "block" else 1


def _tiles(call: Call, arch: int) -> tuple[Tile, ...]:
    return _TILES_FP8 if _multiplies_fp8(call, arch) else _TILES_16BIT


def _type(call: Call) -> str:
    """Of pointers to x, bias and y."""
    return f"*{TRITON_TYPES[call.dtypes['x']]}"


def _kernel(
    function: str,
    parameters: dict[str, str],
    constants: dict[str, Constant],
    num_warps: int,
    num_stages: int = 1,
) -> Kernel:
    return Kernel(
        "fp8_gemm", function, tuple(parameters.items()), tuple(constants.items()), num_warps, num_stages
    )


def _gemm(call: Call, arch: int, tile: Tile, split: bool) -> Kernel:
    fp8 = _multiplies_fp8(call, arch)
    # One warpgroup holds a large tile on Hopper; the others would run out of registers.
    num_warps = 8 if tile.tokens == 128 and arch != 90 else tile.num_warps
    return _kernel(
        "gemm",
        {
            "y": _type(call),
            "partial": "*fp32",
            "x": "*fp8e4nv" if fp8 else _type(call),
            "x_scale": "*fp32",
            "weight": "*fp8e4nv" if fp8 else "*i32",
            "scale": "*fp32",
            "bias": _type(call),
            "num_tokens": "i32",
            "out_features": "i32",
            "in_features": "i32",
            "steps_per_split": "i32",
        },
        {
            "FP8": fp8,
            "SCALES": str(call.attributes["scales"]),
            "ACTIVATION": str(call.attributes["activation"]),
            "BIAS": "bias" in call.shapes and not split,
            "SPLIT": split,
            "BLOCK_N": tile.outputs,
            "BLOCK_T": tile.tokens,
            "BLOCK_K": tile.step,
        },
        num_warps,
        tile.num_stages,
    )


def _add_splits(call: Call) -> Kernel:
    return _kernel(
        "add_splits",
        {"y": _type(call), "partial": "*fp32", "bias": _type(call), "out_features": "i32", "splits": "i32"},
        {"BIAS": "bias" in call.shapes, "MAX_SPLITS": MAX_SPLITS, "BLOCK": _REDUCE_BLOCK},
        num_warps=4,
    )


def _quantize(call: Call, arch: int) -> Launch:
    num_tokens, in_features = call.shapes["x"]
    values = "*fp8e4nv" if _multiplies_fp8(call, arch) else _type(call)
    dynamic = call.attributes["activation"] == "dynamic"
    parameters = {"values": values, "scales": "*fp32", "x": _type(call)}
    arguments: dict[str, str | int | float | None] = {
        "values": "values",
        "scales": "scales" if dynamic else None,
        "x": "x",
        "in_features": in_features,
    }
    if dynamic and call.attributes["scales"] != "block":
        kernel = _kernel("quantize_rows", parameters | {"in_features": "i32"}, {"BLOCK": _ROW_BLOCK}, 8)
        return Launch(kernel, (num_tokens, 1, 1), arguments)
    kernel = _kernel(
        "quantize_blocks",
        parameters | {"x_scale": "*fp32", "num_tokens": "i32", "in_features": "i32"},
        {"DYNAMIC": dynamic, "BLOCKS": _BLOCKS},
        num_warps=4,
    )
    arguments |= {"x_scale": None if dynamic else "x_scale", "num_tokens": num_tokens}
    return Launch(kernel, (num_tokens, -(-in_features // (_BLOCKS * SCALE_BLOCK)), 1), arguments)

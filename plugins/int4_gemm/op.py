"""Int4Gemm: a projection whose weight is stored in four bits, with a scale and a zero point a group."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.op import FLOATS, OpSpec, Tensor

# A weight lies in blocks of TILE rows (outputs) by STEP columns (inputs); both are padded to full blocks.
TILE = 64
STEP = 128
WORDS = STEP // 8  # int32 words of a row of a block
CHUNK = 32  # columns that one shift of a block's words yields; no group is smaller
GROUP_SIZES = (32, 64, 128)

INT4_GEMM = OpSpec(
    name="Int4Gemm",
    doc=(
        "y = x[:, perm] @ ((values - zero) * scale)^T + bias. The values, 0 to 15, are those of `weight`, "
        "whose word j of a row of a block has in bits 4i to 4i+3 column 32i + 2j and, 16 bits higher, "
        "column 32i + 2j + 1. `scales` holds scale and zero point of each group of columns; one group "
        "alone spans all columns."
    ),
    inputs=(
        Tensor("x", "T", ("num_tokens", "in_features")),
        Tensor("weight", "W", ("num_tiles", "num_steps", TILE, WORDS)),
        Tensor("scales", "T", ("num_groups", "out_features", 2)),
        Tensor("bias", "T", ("out_features",), optional=True),
        Tensor("perm", "I", ("in_features",), optional=True),
    ),
    outputs=(Tensor("y", "T", ("num_tokens", "out_features")),),
    dtypes={"T": FLOATS, "W": ("tensor(int32)",), "I": ("tensor(int32)",)},
)


def group_size(in_features: int, num_groups: int) -> int:
    """Columns that share a scale: `in_features` where there is one group.

    Raises PluginError for sizes that the layout cannot hold.
    """
    if in_features <= 0 or in_features % CHUNK:
        raise PluginError(f"Int4Gemm: in_features is {in_features}, which is no multiple of {CHUNK}")
    if num_groups == 1:
        return in_features
    size, rest = divmod(in_features, num_groups)
    if rest or size not in GROUP_SIZES:
        raise PluginError(
            f"Int4Gemm: {num_groups} groups do not divide in_features = {in_features} into groups of "
            f"{GROUP_SIZES} columns"
        )
    return size


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """The dims of `weight`."""
    return -(-out_features // TILE), -(-in_features // STEP), TILE, WORDS

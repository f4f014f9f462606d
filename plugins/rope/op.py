"""Rope: queries and keys rotated by their positions' angles, in one pass over memory."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.op import FLOATS, Attribute, AttributeValue, OpSpec, Tensor

ROPE = OpSpec(
    name="Rope",
    doc=(
        "The first rotary_dim elements of each head of q and k, in pairs (a, b), become (a cos - b sin, "
        "b cos + a sin) in float32; the rest stays. A pair is (i, i + rotary_dim / 2), with interleaved = 1 "
        "(2i, 2i + 1)."
    ),
    inputs=(
        Tensor("q", "T", ("num_tokens", "num_heads", "head_dim")),
        Tensor("k", "T", ("num_tokens", "num_kv_heads", "head_dim")),
        Tensor("cos", "C", ("num_tokens", "num_pairs")),
        Tensor("sin", "C", ("num_tokens", "num_pairs")),
    ),
    outputs=(
        Tensor("q_out", "T", ("num_tokens", "num_heads", "head_dim")),
        Tensor("k_out", "T", ("num_tokens", "num_kv_heads", "head_dim")),
    ),
    dtypes={"T": FLOATS, "C": FLOATS},
    attributes=(
        Attribute("interleaved", "int", 0),
        Attribute("rotary_dim", "int", 0),  # 0: head_dim
    ),
)


def rotated_size(head_dim: int, num_pairs: int, rotary_dim: AttributeValue) -> int:
    """How many elements of a head are rotated. Raises PluginError if cos has another number of pairs."""
    size = int(rotary_dim) or head_dim
    if size > head_dim or size != 2 * num_pairs:
        raise PluginError(
            f"Rope rotates {size} of {head_dim} elements of a head, but cos and sin are of {num_pairs} pairs"
        )
    return size

"""QkNorm: the heads of queries and keys normalized, in one pass over memory."""

from __future__ import annotations

from trtforge.plugins.op import FLOATS, Attribute, OpSpec, Tensor

QK_NORM = OpSpec(
    name="QkNorm",
    doc=(
        "Every head x of q and k becomes x / sqrt(mean(x^2) + eps) * weight, with q_weight and k_weight, in "
        "float32 and rounded once. With unit_offset = 1 the weights are 1 + q_weight and 1 + k_weight."
    ),
    inputs=(
        Tensor("q", "T", ("num_tokens", "num_heads", "head_dim")),
        Tensor("k", "T", ("num_tokens", "num_kv_heads", "head_dim")),
        Tensor("q_weight", "T", ("head_dim",)),
        Tensor("k_weight", "T", ("head_dim",)),
    ),
    outputs=(
        Tensor("q_out", "T", ("num_tokens", "num_heads", "head_dim")),
        Tensor("k_out", "T", ("num_tokens", "num_kv_heads", "head_dim")),
    ),
    dtypes={"T": FLOATS},
    attributes=(Attribute("eps", "float"), Attribute("unit_offset", "int", 0)),
)

"""Linear: a projection that keeps its weight's name and layout."""

from __future__ import annotations

from trtforge.plugins.op import FLOATS, OpSpec, Tensor

LINEAR = OpSpec(
    name="Linear",
    doc="y = x @ weight^T + bias over the last dim of x, which may have any rank from 1.",
    inputs=(
        Tensor("x", "T", ("num_tokens", "in_features")),
        Tensor("weight", "T", ("out_features", "in_features")),
        Tensor("bias", "T", ("out_features",), optional=True),
    ),
    outputs=(Tensor("y", "T", ("num_tokens", "out_features")),),
    dtypes={"T": FLOATS},
)

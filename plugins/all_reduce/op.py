"""AllReduce: the sum over the tensor-parallel ranks of a pipeline stage."""

from __future__ import annotations

from trtforge.plugins.op import FLOATS, OpSpec, Tensor

ALL_REDUCE = OpSpec(
    name="AllReduce",
    doc="y = the sum of x over the tensor-parallel ranks of the same pipeline stage, equal on all of them.",
    inputs=(Tensor("x", "T", ("num_tokens", "num_columns")),),
    outputs=(Tensor("y", "T", ("num_tokens", "num_columns")),),
    dtypes={"T": FLOATS},
)

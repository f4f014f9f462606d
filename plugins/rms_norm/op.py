"""AddRmsNorm: a residual and its normalization in one pass over memory."""

from __future__ import annotations

from trtforge.plugins.op import FLOATS, Attribute, OpSpec, Tensor

ADD_RMS_NORM = OpSpec(
    name="AddRmsNorm",
    doc=("h = x + residual, rounded to its dtype, and y = h / sqrt(mean(h^2) + eps) * weight, in float32."),
    inputs=(
        Tensor("x", "T", ("num_tokens", "hidden_size")),
        Tensor("residual", "T", ("num_tokens", "hidden_size")),
        Tensor("weight", "T", ("hidden_size",)),
    ),
    outputs=(
        Tensor("y", "T", ("num_tokens", "hidden_size")),
        Tensor("h", "T", ("num_tokens", "hidden_size")),
    ),
    dtypes={"T": FLOATS},
    attributes=(Attribute("eps", "float"),),
)

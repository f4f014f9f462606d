"""MoeExperts: the experts of one mixture-of-experts layer, after routing."""

from __future__ import annotations

from trtforge.plugins.op import FLOATS, INTS, Attribute, OpSpec, Tensor

MOE_EXPERTS = OpSpec(
    name="MoeExperts",
    doc=(
        "out[t] = sum over k of router_weights[t, k] * expert(router_indices[t, k])(x[t]), with expert(x) = "
        "down @ gate(gate_up @ x). Weights are [out, in] or, with transposed = 1, [in, out]; gate_up's "
        "output holds gate and up in halves or, for swiglu_oai, interleaved. Offsets are what zero points of "
        "weights take away: times the sum of each group of input features, subtracted from the product."
    ),
    inputs=(
        Tensor("x", "T", ("num_tokens", "hidden_size")),
        Tensor("router_indices", "I", ("num_tokens", "top_k")),
        Tensor("router_weights", "R", ("num_tokens", "top_k")),
        Tensor("gate_up", "T", ("num_experts", "gate_up_rows", "gate_up_cols")),
        Tensor("down", "T", ("num_experts", "down_rows", "down_cols")),
        Tensor("gate_up_bias", "T", ("num_experts", "gate_up_size"), optional=True),
        Tensor("down_bias", "T", ("num_experts", "hidden_size"), optional=True),
        Tensor("gate_up_offset", "T", ("num_experts", "gate_up_groups", "gate_up_size"), optional=True),
        Tensor("down_offset", "T", ("num_experts", "down_groups", "hidden_size"), optional=True),
    ),
    outputs=(Tensor("out", "T", ("num_tokens", "hidden_size")),),
    dtypes={"T": FLOATS, "R": FLOATS, "I": INTS},
    attributes=(
        Attribute("activation", "string"),  # silu, gelu, gelu_tanh, swiglu_oai
        Attribute("transposed", "int", 0),
        Attribute("alpha", "float", 1.702),  # swiglu_oai: gate * sigmoid(alpha * gate)
        Attribute("limit", "float", 7.0),  # swiglu_oai: clamps gate from above, up from both sides
    ),
)

"""SiluMul: the gate of a gated feed-forward layer in one pass over memory."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.op import FLOATS, Attribute, AttributeValue, OpSpec, Tensor

ACTIVATIONS = ("silu", "gelu_tanh")

SILU_MUL = OpSpec(
    name="SiluMul",
    doc="y = activation(gate) * up in float32 at least, where gate_up holds both: gate first.",
    inputs=(Tensor("gate_up", "T", ("num_tokens", 2, "intermediate_size")),),
    outputs=(Tensor("y", "T", ("num_tokens", "intermediate_size")),),
    dtypes={"T": FLOATS},
    attributes=(Attribute("activation", "string", "silu"),),
)


def check_activation(activation: AttributeValue) -> None:
    """Raises PluginError for an unknown activation."""
    if activation not in ACTIVATIONS:
        raise PluginError(f"SiluMul has no activation {activation!r}, only {', '.join(ACTIVATIONS)}")

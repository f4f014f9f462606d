"""Fp8Gemm: a projection whose weight is e4m3, with activations of 16 bits or e4m3 too."""

from __future__ import annotations

from trtforge.errors import PluginError
from trtforge.plugins.op import FLOATS, Attribute, AttributeValue, OpSpec, Tensor

SCALE_BLOCK = 128  # rows and columns of the weight that share a scale, and inputs of a token
E4M3_MAX = 448.0

SCALES = ("tensor", "channel", "block")
ACTIVATIONS = ("none", "static", "dynamic")

FP8_GEMM = OpSpec(
    name="Fp8Gemm",
    doc=(
        "y = x @ (weight * scale)^T + bias. scale is [1, 1], [out_features, 1] or [ceil(out_features / 128), "
        "ceil(in_features / 128)], as `scales` says. With `activation` x is first rounded to e4m3 times a "
        "scale: the given x_scale, or what makes the largest magnitude of a token (with scales of blocks: of "
        "128 inputs of a token) 448."
    ),
    inputs=(
        Tensor("x", "T", ("num_tokens", "in_features")),
        Tensor("weight", "W", ("out_features", "in_features")),
        Tensor("scale", "S", ("scale_rows", "scale_columns")),
        Tensor("bias", "T", ("out_features",), optional=True),
        Tensor("x_scale", "S", (1,), optional=True),
    ),
    outputs=(Tensor("y", "T", ("num_tokens", "out_features")),),
    dtypes={"T": FLOATS, "W": ("tensor(float8e4m3fn)",), "S": ("tensor(float)",)},
    attributes=(
        Attribute("scales", "string"),  # of the weight: tensor, channel, block
        Attribute("activation", "string", "none"),  # none: x as it is; static, dynamic: quantized to e4m3
    ),
)


def scale_shape(scales: AttributeValue, out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of `scale`. Raises PluginError for an unknown kind of scales."""
    if scales == "tensor":
        return 1, 1
    if scales == "channel":
        return out_features, 1
    if scales == "block":
        return -(-out_features // SCALE_BLOCK), -(-in_features // SCALE_BLOCK)
    raise PluginError(f"Fp8Gemm has no scales {scales!r}, only {', '.join(SCALES)}")


def check_activation(activation: AttributeValue, x_scale_given: bool) -> None:
    """Raises PluginError for an unknown activation, and if x_scale is missing or would be ignored."""
    if activation not in ACTIVATIONS:
        raise PluginError(f"Fp8Gemm has no activation {activation!r}, only {', '.join(ACTIVATIONS)}")
    if x_scale_given != (activation == "static"):
        raise PluginError(
            f"Fp8Gemm takes x_scale with the activation static and no other: activation {activation!r}, "
            f"x_scale {'given' if x_scale_given else 'not given'}"
        )

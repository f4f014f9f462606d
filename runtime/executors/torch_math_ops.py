"""Standard ONNX operators (opset 23) in torch that compute: those of exported graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn import functional

from trtforge.errors import ConfigError
from trtforge.runtime.executors.torch_experts import dequantize_linear
from trtforge.runtime.executors.torch_operation import (
    Attributes,
    Operation,
    Sizes,
    StandardOp,
    ints,
    plain,
    torch_dtype,
)


def _div(a: Any, b: Any) -> Any:
    """Integers are rounded towards zero."""
    one = a if isinstance(a, Tensor) else b
    return torch.div(a, b, rounding_mode=None if one.is_floating_point() else "trunc")


def _pow(base: Tensor, exponent: Any) -> Tensor:
    return base * base if isinstance(exponent, float) and exponent == 2.0 else torch.pow(base, exponent)


def _cast(attributes: Attributes, device: torch.device) -> Operation:
    dtype = torch_dtype(attributes["to"])
    return lambda x: x.to(dtype)


def _gelu(attributes: Attributes, device: torch.device) -> Operation:
    approximate = attributes.get("approximate", "none")
    return lambda x: functional.gelu(x, approximate=approximate)


def _gemm(attributes: Attributes, device: torch.device) -> Operation:
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    transpose_a, transpose_b = attributes.get("transA", 0), attributes.get("transB", 0)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.T if transpose_a else a, b.T if transpose_b else b
        return alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return gemm


# --------------------------------------------------------------------------- reductions and norms


def _reduce(function: Callable[..., Tensor]) -> Callable[[Attributes, torch.device], Operation]:
    def make(attributes: Attributes, device: torch.device) -> Operation:
        keepdims = bool(attributes.get("keepdims", 1))
        does_nothing_without_axes = attributes.get("noop_with_empty_axes", 0)

        def reduce(x: Tensor, axes: Sizes | None = None) -> Tensor:
            dims = [] if axes is None else ints(axes)
            if not dims and does_nothing_without_axes:
                return x
            return function(x, dim=dims or list(range(x.ndim)), keepdim=keepdims)

        return reduce

    return make


def _softmax(attributes: Attributes, device: torch.device) -> Operation:
    axis = attributes.get("axis", -1)
    return lambda x: torch.softmax(x, dim=axis)


def _layer_normalization(attributes: Attributes, device: torch.device) -> Operation:
    """Computed in float32 for every type, as stash_type 1 says, and rounded once."""
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)
    if attributes.get("stash_type", 1) != onnx.TensorProto.FLOAT:
        raise ConfigError(f"LayerNormalization has stash_type {attributes['stash_type']}: only 1 is known")
    return lambda x, scale, bias=None: functional.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _rotary_embedding(attributes: Attributes, device: torch.device) -> Operation:
    """x [B, H, T, D] with angles [B, T, rotated / 2]; pairs are (i, i + rotated / 2), or neighbours if
    interleaved."""
    interleaved, rotated = attributes.get("interleaved", 0), attributes.get("rotary_embedding_dim", 0)

    def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is not None or x.ndim != 4:
            raise ConfigError("RotaryEmbedding has position_ids or no dim of heads: not known here")
        size = rotated or x.shape[-1]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        head, rest = x[..., :size], x[..., size:]
        if interleaved:
            one, other = head[..., 0::2], head[..., 1::2]
        else:
            one, other = head.chunk(2, dim=-1)
        real, imaginary = one * cos - other * sin, one * sin + other * cos
        if interleaved:
            return torch.cat([torch.stack([real, imaginary], dim=-1).flatten(-2), rest], dim=-1)
        return torch.cat([real, imaginary, rest], dim=-1)

    return rotary_embedding


MATH_OPS: Mapping[str, StandardOp] = {
    "Add": StandardOp(plain(operator.add), takes_numbers=True),
    "And": StandardOp(plain(torch.logical_and)),
    "Cast": StandardOp(_cast),
    "Cos": StandardOp(plain(torch.cos)),
    "DequantizeLinear": StandardOp(dequantize_linear),
    "Div": StandardOp(plain(_div), takes_numbers=True),
    "Gelu": StandardOp(_gelu),
    "Gemm": StandardOp(_gemm),
    "GreaterOrEqual": StandardOp(plain(operator.ge), takes_numbers=True),
    "LayerNormalization": StandardOp(_layer_normalization),
    "Less": StandardOp(plain(operator.lt), takes_numbers=True),
    "MatMul": StandardOp(plain(torch.matmul)),
    "Mul": StandardOp(plain(operator.mul), takes_numbers=True),
    "Not": StandardOp(plain(torch.logical_not)),
    "Pow": StandardOp(plain(_pow), takes_numbers=True),
    "Reciprocal": StandardOp(plain(torch.reciprocal)),
    "ReduceMean": StandardOp(_reduce(torch.mean), sizes=(1,)),
    "ReduceSum": StandardOp(_reduce(torch.sum), sizes=(1,)),
    "Relu": StandardOp(plain(torch.relu)),
    "RotaryEmbedding": StandardOp(_rotary_embedding),
    "Sigmoid": StandardOp(plain(torch.sigmoid)),
    "Sin": StandardOp(plain(torch.sin)),
    "Softmax": StandardOp(_softmax),
    "Sqrt": StandardOp(plain(torch.sqrt)),
    "Sub": StandardOp(plain(operator.sub), takes_numbers=True),
    "Tanh": StandardOp(plain(torch.tanh)),
    "Where": StandardOp(plain(torch.where)),
}

"""Standard ONNX operators (opset 23) in torch: those that exported graphs have."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
import torch
from torch import Tensor
from torch.nn import functional

from trtforge.errors import ConfigError

# A node's inputs in order, None for one left out -> its output, or a tuple of several.
Operation: TypeAlias = Callable[..., Any]
Attributes: TypeAlias = Mapping[str, Any]
# Integers that are read on the host: a list if they are constant, else a tensor in host memory.
Sizes: TypeAlias = Sequence[int] | Tensor

TORCH_DTYPES: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True, slots=True)
class StandardOp:
    """How nodes of one operator are made; `make` raises ConfigError for attributes that are not known here.

    No operation waits for the device: what it has to know on the host are its `sizes`.
    """

    make: Callable[[Attributes, torch.device], Operation]
    sizes: tuple[int, ...] = ()  # inputs that are integers read on the host
    takes_numbers: bool = False  # constants without dims may come as numbers


def torch_dtype(onnx_dtype: int) -> torch.dtype:
    """Raises ConfigError for a type that torch has no tensors of."""
    if onnx_dtype not in TORCH_DTYPES:
        name = onnx.TensorProto.DataType.Name(onnx_dtype)
        raise ConfigError(f"the graph has tensors of type {name}, which the reference runtime does not know")
    return TORCH_DTYPES[onnx_dtype]


def _plain(function: Operation) -> Callable[[Attributes, torch.device], Operation]:
    """Of operators that have no attributes."""
    return lambda attributes, device: function


def _ints(values: Sizes) -> list[int]:
    return values.flatten().tolist() if isinstance(values, Tensor) else list(values)


# --------------------------------------------------------------------------- arithmetic


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
            dims = [] if axes is None else _ints(axes)
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


# --------------------------------------------------------------------------- shapes


def _shape(attributes: Attributes, device: torch.device) -> Operation:
    start, end = attributes.get("start", 0), attributes.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _reshape(attributes: Attributes, device: torch.device) -> Operation:
    keeps_zeros = attributes.get("allowzero", 0)

    def reshape(x: Tensor, shape: Sizes) -> Tensor:
        sizes = _ints(shape)
        if not keeps_zeros:
            sizes = [size or x.shape[dim] for dim, size in enumerate(sizes)]
        return x.reshape(sizes)

    return reshape


def _squeeze(x: Tensor, axes: Sizes | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(_ints(axes))


def _unsqueeze(x: Tensor, axes: Sizes) -> Tensor:
    dims = _ints(axes)
    ndim = x.ndim + len(dims)
    for dim in sorted(dim % ndim for dim in dims):
        x = x.unsqueeze(dim)
    return x


def _expand(x: Tensor, shape: Sizes) -> Tensor:
    """A size of 1 in `shape` keeps that of x."""
    sizes = _ints(shape)
    sizes = [1] * (x.ndim - len(sizes)) + sizes
    num_new = len(sizes) - x.ndim
    return x.expand([-1 if size == 1 and dim >= num_new else size for dim, size in enumerate(sizes)])


def _transpose(attributes: Attributes, device: torch.device) -> Operation:
    perm = attributes.get("perm")
    return lambda x: x.permute(perm if perm is not None else list(range(x.ndim))[::-1])


def _concat(attributes: Attributes, device: torch.device) -> Operation:
    axis = attributes["axis"]
    return lambda *tensors: torch.cat(tensors, dim=axis)


def _split(attributes: Attributes, device: torch.device) -> Operation:
    axis: int = attributes.get("axis", 0)
    num_outputs: int = attributes.get("num_outputs", 1)  # not there where sizes are

    def split(x: Tensor, sizes: Sizes | None = None) -> tuple[Tensor, ...]:
        if sizes is not None:
            return torch.split(x, _ints(sizes), dim=axis)
        size = -(-x.shape[axis] // num_outputs)
        last = x.shape[axis] - (num_outputs - 1) * size  # may be smaller
        return torch.split(x, [size] * (num_outputs - 1) + [last], dim=axis)

    return split


def _slice(
    x: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None = None, steps: Sizes | None = None
) -> Tensor:
    begins, stops = _ints(starts), _ints(ends)
    dims = range(len(begins)) if axes is None else _ints(axes)
    strides = [1] * len(begins) if steps is None else _ints(steps)
    index = [slice(None)] * x.ndim
    for dim, begin, stop, stride in zip(dims, begins, stops, strides, strict=True):
        index[dim] = slice(begin, stop, stride)
    return x[tuple(index)]


def _pad(attributes: Attributes, device: torch.device) -> Operation:
    mode = attributes.get("mode", "constant")
    if mode != "constant":
        raise ConfigError(f"Pad has mode {mode}: only constant is known here")

    def pad(x: Tensor, pads: Sizes, value: float = 0.0) -> Tensor:
        amounts = _ints(pads)
        pairs = [(amounts[dim], amounts[x.ndim + dim]) for dim in reversed(range(x.ndim))]  # torch's order
        return functional.pad(x, [amount for pair in pairs for amount in pair], value=value)

    return pad


# --------------------------------------------------------------------------- making, taking and putting


def _range(attributes: Attributes, device: torch.device) -> Operation:
    def arange(start: Sizes, limit: Sizes, delta: Sizes) -> Tensor:
        (first,), (end,), (step,) = _ints(start), _ints(limit), _ints(delta)
        return torch.arange(first, end, step, dtype=torch.int64, device=device)

    return arange


def _constant_of_shape(attributes: Attributes, device: torch.device) -> Operation:
    value = torch.zeros(1)
    if "value" in attributes:
        value = torch.from_numpy(onnx.numpy_helper.to_array(attributes["value"]).copy())
    number, dtype = value.item(), value.dtype
    return lambda shape: torch.full(_ints(shape), number, dtype=dtype, device=device)


def _gather(attributes: Attributes, device: torch.device) -> Operation:
    axis = attributes.get("axis", 0)
    return lambda x, indices: x[(*[slice(None)] * (axis % x.ndim), indices)]


def _non_negative(indices: Tensor, size: int) -> Tensor:
    """Indices from the end as those from the beginning."""
    return torch.where(indices < 0, indices + size, indices)


def _gather_elements(attributes: Attributes, device: torch.device) -> Operation:
    axis = attributes.get("axis", 0)
    return lambda x, indices: x.gather(axis, _non_negative(indices, x.shape[axis]))


def _scatter_elements(attributes: Attributes, device: torch.device) -> Operation:
    axis = attributes.get("axis", 0)
    _refuse_reduction("ScatterElements", attributes)
    return lambda x, indices, updates: x.scatter(axis, _non_negative(indices, x.shape[axis]), updates)


def _scatter_nd(attributes: Attributes, device: torch.device) -> Operation:
    _refuse_reduction("ScatterND", attributes)
    return lambda x, indices, updates: x.index_put(indices.unbind(-1), updates)


def _refuse_reduction(op_type: str, attributes: Attributes) -> None:
    reduction = attributes.get("reduction", "none")
    if reduction != "none":
        raise ConfigError(f"{op_type} has reduction {reduction}: only none is known here")


def _top_k(attributes: Attributes, device: torch.device) -> Operation:
    axis, largest = attributes.get("axis", -1), bool(attributes.get("largest", 1))
    in_order = bool(attributes.get("sorted", 1))

    def top_k(x: Tensor, k: Sizes) -> tuple[Tensor, Tensor]:
        (count,) = _ints(k)
        values, indices = torch.topk(x, count, dim=axis, largest=largest, sorted=in_order)
        return values, indices

    return top_k


STANDARD_OPS: Mapping[str, StandardOp] = {
    "Add": StandardOp(_plain(operator.add), takes_numbers=True),
    "Cast": StandardOp(_cast),
    "Concat": StandardOp(_concat),
    "ConstantOfShape": StandardOp(_constant_of_shape, sizes=(0,)),
    "Cos": StandardOp(_plain(torch.cos)),
    "Div": StandardOp(_plain(_div), takes_numbers=True),
    "Expand": StandardOp(_plain(_expand), sizes=(1,)),
    "Gather": StandardOp(_gather),
    "GatherElements": StandardOp(_gather_elements),
    "Gelu": StandardOp(_gelu),
    "Gemm": StandardOp(_gemm),
    "LayerNormalization": StandardOp(_layer_normalization),
    "Mul": StandardOp(_plain(operator.mul), takes_numbers=True),
    "Not": StandardOp(_plain(torch.logical_not)),
    "Pad": StandardOp(_pad, sizes=(1,), takes_numbers=True),
    "Pow": StandardOp(_plain(_pow), takes_numbers=True),
    "Range": StandardOp(_range, sizes=(0, 1, 2)),
    "Reciprocal": StandardOp(_plain(torch.reciprocal)),
    "ReduceMean": StandardOp(_reduce(torch.mean), sizes=(1,)),
    "ReduceSum": StandardOp(_reduce(torch.sum), sizes=(1,)),
    "Relu": StandardOp(_plain(torch.relu)),
    "Reshape": StandardOp(_reshape, sizes=(1,)),
    "RotaryEmbedding": StandardOp(_rotary_embedding),
    "ScatterElements": StandardOp(_scatter_elements),
    "ScatterND": StandardOp(_scatter_nd),
    "Shape": StandardOp(_shape),
    "Sigmoid": StandardOp(_plain(torch.sigmoid)),
    "Sin": StandardOp(_plain(torch.sin)),
    "Slice": StandardOp(_plain(_slice), sizes=(1, 2, 3, 4)),
    "Softmax": StandardOp(_softmax),
    "Split": StandardOp(_split, sizes=(1,)),
    "Sqrt": StandardOp(_plain(torch.sqrt)),
    "Squeeze": StandardOp(_plain(_squeeze), sizes=(1,)),
    "Sub": StandardOp(_plain(operator.sub), takes_numbers=True),
    "Tanh": StandardOp(_plain(torch.tanh)),
    "TopK": StandardOp(_top_k, sizes=(1,)),
    "Transpose": StandardOp(_transpose),
    "Unsqueeze": StandardOp(_plain(_unsqueeze), sizes=(1,)),
    "Where": StandardOp(_plain(torch.where)),
}

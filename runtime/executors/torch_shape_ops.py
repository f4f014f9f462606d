"""Standard ONNX operators (opset 23) in torch that shape, make, take and put: those of exported graphs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor
from torch.nn import functional

from trtforge.errors import ConfigError
from trtforge.runtime.executors.torch_operation import Attributes, Operation, Sizes, StandardOp, ints, plain


def _shape(attributes: Attributes, device: torch.device) -> Operation:
    start, end = attributes.get("start", 0), attributes.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def _reshape(attributes: Attributes, device: torch.device) -> Operation:
    keeps_zeros = attributes.get("allowzero", 0)

    def reshape(x: Tensor, shape: Sizes) -> Tensor:
        sizes = ints(shape)
        if not keeps_zeros:
            sizes = [size or x.shape[dim] for dim, size in enumerate(sizes)]
        return x.reshape(sizes)

    return reshape


def _squeeze(x: Tensor, axes: Sizes | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def _unsqueeze(x: Tensor, axes: Sizes) -> Tensor:
    dims = ints(axes)
    ndim = x.ndim + len(dims)
    for dim in sorted(dim % ndim for dim in dims):
        x = x.unsqueeze(dim)
    return x


def _expand(x: Tensor, shape: Sizes) -> Tensor:
    """A size of 1 in `shape` keeps that of x."""
    sizes = ints(shape)
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
            return torch.split(x, ints(sizes), dim=axis)
        size = -(-x.shape[axis] // num_outputs)
        last = x.shape[axis] - (num_outputs - 1) * size  # may be smaller
        return torch.split(x, [size] * (num_outputs - 1) + [last], dim=axis)

    return split


def _slice(
    x: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None = None, steps: Sizes | None = None
) -> Tensor:
    begins, stops = ints(starts), ints(ends)
    dims = range(len(begins)) if axes is None else ints(axes)
    strides = [1] * len(begins) if steps is None else ints(steps)
    index = [slice(None)] * x.ndim
    for dim, begin, stop, stride in zip(dims, begins, stops, strides, strict=True):
        index[dim] = slice(begin, stop, stride)
    return x[tuple(index)]


def _pad(attributes: Attributes, device: torch.device) -> Operation:
    mode = attributes.get("mode", "constant")
    if mode != "constant":
        raise ConfigError(f"Pad has mode {mode}: only constant is known here")

    def pad(x: Tensor, pads: Sizes, value: float = 0.0) -> Tensor:
        amounts = ints(pads)
        pairs = [(amounts[dim], amounts[x.ndim + dim]) for dim in reversed(range(x.ndim))]  # torch's order
        return functional.pad(x, [amount for pair in pairs for amount in pair], value=value)

    return pad


# --------------------------------------------------------------------------- making, taking and putting


def _range(attributes: Attributes, device: torch.device) -> Operation:
    def arange(start: Sizes, limit: Sizes, delta: Sizes) -> Tensor:
        (first,), (end,), (step,) = ints(start), ints(limit), ints(delta)
        return torch.arange(first, end, step, dtype=torch.int64, device=device)

    return arange


def _constant_of_shape(attributes: Attributes, device: torch.device) -> Operation:
    value = torch.zeros(1)
    if "value" in attributes:
        value = torch.from_numpy(onnx.numpy_helper.to_array(attributes["value"]).copy())
    number, dtype = value.item(), value.dtype
    return lambda shape: torch.full(ints(shape), number, dtype=dtype, device=device)


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
        (count,) = ints(k)
        values, indices = torch.topk(x, count, dim=axis, largest=largest, sorted=in_order)
        return values, indices

    return top_k


SHAPE_OPS: Mapping[str, StandardOp] = {
    "Concat": StandardOp(_concat),
    "ConstantOfShape": StandardOp(_constant_of_shape, sizes=(0,)),
    "Expand": StandardOp(plain(_expand), sizes=(1,)),
    "Gather": StandardOp(_gather),
    "GatherElements": StandardOp(_gather_elements),
    "Pad": StandardOp(_pad, sizes=(1,), takes_numbers=True),
    "Range": StandardOp(_range, sizes=(0, 1, 2)),
    "Reshape": StandardOp(_reshape, sizes=(1,)),
    "ScatterElements": StandardOp(_scatter_elements),
    "ScatterND": StandardOp(_scatter_nd),
    "Shape": StandardOp(_shape),
    "Slice": StandardOp(plain(_slice), sizes=(1, 2, 3, 4)),
    "Split": StandardOp(_split, sizes=(1,)),
    "Squeeze": StandardOp(plain(_squeeze), sizes=(1,)),
    "TopK": StandardOp(_top_k, sizes=(1,)),
    "Transpose": StandardOp(_transpose),
    "Unsqueeze": StandardOp(plain(_unsqueeze), sizes=(1,)),
}

"""The project's own operators in torch: by a kernel, in torch, or else by their reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trtforge.errors import ConfigError, PluginError
from trtforge.plugins.op import DOMAIN, Array, AttributeValue
from trtforge.plugins.operator import Operator
from trtforge.plugins.operators import OPERATORS
from trtforge.runtime.executors.kernel_calls import KernelCalls, Launcher
from trtforge.runtime.executors.operator_shapes import merge_leading_dims, split_leading_dims
from trtforge.runtime.executors.torch_attention import TorchAttention
from trtforge.runtime.executors.torch_experts import ExpertWeights
from trtforge.runtime.executors.torch_graph import Node
from trtforge.runtime.executors.torch_links import Links
from trtforge.runtime.executors.torch_operation import Operation

# Types that numpy has only with ml_dtypes, and those of the same size that torch gives to numpy.
_ML_DTYPES: Mapping[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
}


class Operators:
    """Makes the operations of a graph's own nodes."""

    def __init__(self, launcher: Launcher | None, links: Links | None = None) -> None:
        """With a launcher, operators that have kernels run by them. `links` add over ranks; without them a
        rank is alone."""
        self._launcher = launcher
        # In torch, each with the number of declared inputs that it knows.
        self._native: Mapping[str, tuple[Operation, int]] = {
            "Linear": (functional.linear, 3),
            "MoeExperts": (moe_experts, 9),
            "PagedAttention": (TorchAttention(), 12),
            **({} if links is None else {"AllReduce": (links.all_reduce, 1)}),
        }
        # Operators met so far whose operations wait for the device: a CUDA graph cannot contain them.
        self.waiting: set[str] = set()

    def make(self, node: Node) -> Operation:
        """Raises ConfigError for an operator that does not exist."""
        operator = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if operator is None:
            raise ConfigError(
                f"the graph has the operator {node.domain}::{node.op_type}, which is not known here"
            )
        spec = operator.spec
        names = {attribute.name for attribute in spec.attributes}
        given = {name: value for name, value in node.attributes.items() if name in names}
        attributes = {name: value for name, value in spec.node_attributes(**given).items() if name in names}
        if self._launcher is not None and operator.kernels is not None:
            return KernelCalls(spec, operator.kernels, attributes, self._launcher)
        if node.op_type != "Linear":
            self.waiting.add(node.op_type)
        native, num_inputs = self._native.get(node.op_type, (None, 0))
        if native is None or len(node.inputs) > num_inputs:
            return functools.partial(run_reference, operator, attributes)
        return functools.partial(native, **attributes)


def moe_experts(
    x: Tensor,  # [T, hidden]
    router_indices: Tensor,  # [T, k]
    router_weights: Tensor,  # [T, k]
    gate_up: ExpertWeights,  # [E, 2 * intermediate, hidden], with transposed [E, hidden, 2 * intermediate]
    down: ExpertWeights,  # [E, hidden, intermediate], with transposed [E, intermediate, hidden]
    gate_up_bias: Tensor | None = None,  # [E, 2 * intermediate]
    down_bias: Tensor | None = None,  # [E, hidden]
    gate_up_offset: Tensor | None = None,  # [E, groups, 2 * intermediate]
    down_offset: Tensor | None = None,  # [E, groups, hidden]
    *,
    activation: str,
    transposed: int,
    alpha: float,
    limit: float,
) -> Tensor:
    """[T, hidden]: one expert after the other, on the tokens that chose it; added up in float32."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in set(router_indices.flatten().tolist()):
        tokens, choices = torch.where(router_indices == expert)
        first, second = gate_up[expert], down[expert]
        if transposed:
            first, second = first.T, second.T
        hidden = _project(x[tokens], first, _of(gate_up_bias, expert), _of(gate_up_offset, expert))
        hidden = _activate(hidden, activation, alpha, limit)
        y = _project(hidden, second, _of(down_bias, expert), _of(down_offset, expert))
        out.index_add_(0, tokens, y.float() * router_weights[tokens, choices, None].float())
    return out.to(x.dtype)


def _of(tensor: Tensor | None, expert: int) -> Tensor | None:
    return None if tensor is None else tensor[expert]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor | None) -> Tensor:
    """`offset`, [groups, out], is what zero points take away: times the sum of each group of x's columns."""
    y = functional.linear(x, weight, bias)
    return y if offset is None else y - x.reshape(len(x), len(offset), -1).sum(-1) @ offset


def _activate(hidden: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """[..., 2 * intermediate] -> [..., intermediate]"""
    if activation == "swiglu_oai":
        gate = hidden[..., ::2].clamp(max=limit)
        up = hidden[..., 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    gate, up = hidden.chunk(2, dim=-1)
    functions: Mapping[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    }
    if activation not in functions:
        raise PluginError(f"MoeExperts has no activation {activation!r}")
    return functions[activation](gate) * up


def run_reference(
    operator: Operator, attributes: Mapping[str, AttributeValue], *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """The outputs that the operator's reference has for `inputs`: slow, on the CPU."""
    spec = operator.spec
    given, leading = merge_leading_dims(spec, inputs)
    arrays = {name: _to_numpy(tensor) for name, tensor in given.items()}
    results = operator.reference(*[arrays.get(declared.name) for declared in spec.inputs], **attributes)
    results = results if isinstance(results, tuple) else (results,)
    device = next(iter(given.values())).device
    outputs = {}
    for declared, result in zip(spec.outputs, results, strict=True):
        output = from_numpy(result).to(device)
        if declared.name in spec.aliases:
            output = given[spec.aliases[declared.name]].copy_(output)
        outputs[declared.name] = output
    return split_leading_dims(spec, outputs, leading)


def _to_numpy(tensor: Tensor) -> Array:
    tensor = tensor.cpu()
    if tensor.dtype in _ML_DTYPES:
        bits, dtype = _ML_DTYPES[tensor.dtype]
        return tensor.contiguous().view(bits).numpy().view(dtype)
    return tensor.numpy()


def from_numpy(array: Array) -> Tensor:
    """A tensor of the same type, also of those that torch does not take from numpy."""
    array = np.ascontiguousarray(array)
    for torch_dtype, (bits, dtype) in _ML_DTYPES.items():
        if array.dtype == dtype:
            return torch.from_numpy(array.view(np.dtype(str(bits).removeprefix("torch.")))).view(torch_dtype)
    return torch.from_numpy(array)

"""Runs an operator's own kernels on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from trtforge.errors import PluginError
from trtforge.plugins.launch import Call, Gpu, Kernels, Plan, workspace_layout
from trtforge.plugins.op import AttributeValue, OpSpec
from trtforge.runtime.executors.operator_shapes import merge_leading_dims, split_leading_dims

_ALIGNMENT = 16  # bytes, of every pointer that a kernel gets


class Launcher(Protocol):
    """Puts the kernels of plans on a stream of one device."""

    @property
    def gpu(self) -> Gpu: ...

    def launch(self, plan: Plan, pointers: Mapping[str, int], workspace_pointer: int, stream: int) -> None:
        """`pointers` has the device address of every tensor by name; see `workspace_layout` for the rest."""


class KernelCalls:
    """The operation of one node. Nothing waits for the device, so that it can be part of a CUDA graph."""

    def __init__(
        self,
        spec: OpSpec,
        kernels: Kernels,
        attributes: Mapping[str, AttributeValue],
        launcher: Launcher,
    ) -> None:
        self._spec = spec
        self._kernels = kernels
        self._attributes = attributes
        self._launcher = launcher

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The declared outputs; see `operator_shapes` for inputs with more dims than declared."""
        merged, leading = merge_leading_dims(self._spec, inputs)
        given = {name: self._aligned(name, tensor) for name, tensor in merged.items()}
        tensors: list[Any] = [given.get(declared.name) for declared in self._spec.inputs]
        outputs = self._allocate_outputs(given, self._spec.check_inputs(*tensors))
        call = Call(
            shapes={name: tuple(tensor.shape) for name, tensor in given.items()},
            dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in given.items()},
            attributes=self._attributes,
        )
        plan = self._kernels.plan(call, self._launcher.gpu)
        device = next(iter(given.values())).device
        _, workspace_bytes = workspace_layout(plan)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        pointers = {name: tensor.data_ptr() for name, tensor in (given | outputs).items()}
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self._launcher.launch(plan, pointers, workspace.data_ptr(), stream)
        return split_leading_dims(self._spec, outputs, leading)

    def _aligned(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
            return tensor
        if name in self._spec.aliases.values():
            raise PluginError(
                f"{self._spec.name} writes into {name}, which has to be contiguous and aligned to "
                f"{_ALIGNMENT} bytes"
            )
        return tensor.clone(memory_format=torch.contiguous_format)

    def _allocate_outputs(self, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Outputs that share an input's memory are that input."""
        examples = {
            declared.dtype: given[declared.name] for declared in self._spec.inputs if declared.name in given
        }
        outputs = {}
        for declared in self._spec.outputs:
            if declared.name in self._spec.aliases:
                outputs[declared.name] = given[self._spec.aliases[declared.name]]
            else:
                shape = [dim if isinstance(dim, int) else sizes[dim] for dim in declared.dims]
                outputs[declared.name] = examples[declared.dtype].new_empty(shape)
        return outputs

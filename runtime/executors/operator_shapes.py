"""Fits the tensors of a node to its operator's declaration.

A graph gives some operators, such as projections, tensors with more dims than are declared: the first ones of
them stand for the one that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from trtforge.plugins.op import OpSpec

# First dim of a declared tensor -> the sizes that stand for it.
LeadingDims: TypeAlias = Mapping[str | int, Sequence[int]]


def merge_leading_dims(
    spec: OpSpec, inputs: Sequence[Tensor | None]
) -> tuple[dict[str, Tensor], LeadingDims]:
    """The inputs that are given, by name and with the declared number of dims, and what was merged."""
    given: dict[str, Tensor] = {}
    leading: dict[str | int, Sequence[int]] = {}
    for declared, tensor in zip(spec.inputs, inputs, strict=False):
        if tensor is None:
            continue
        num_merged = tensor.ndim - len(declared.dims) + 1
        if num_merged > 1:
            leading[declared.dims[0]] = tensor.shape[:num_merged]
            tensor = tensor.flatten(0, num_merged - 1)
        given[declared.name] = tensor
    return given, leading


def split_leading_dims(
    spec: OpSpec, outputs: Mapping[str, Tensor], leading: LeadingDims
) -> tuple[Tensor, ...]:
    """The outputs in declared order; those that begin with a dim of `leading` get its sizes back."""
    return tuple(
        output.reshape(*leading[declared.dims[0]], *output.shape[1:])
        if declared.dims[0] in leading
        else output
        for declared, output in ((declared, outputs[declared.name]) for declared in spec.outputs)
    )

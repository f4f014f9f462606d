"""The operators as torch sees them while a model is traced: opaque calls that become ONNX nodes.

They have shapes and no arithmetic: tracing happens on the meta device, where nothing is computed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch

from trtforge.plugins.linear.op import LINEAR
from trtforge.plugins.moe_experts.op import MOE_EXPERTS
from trtforge.plugins.op import DOMAIN, OPSET_VERSION, AttributeValue, OpSpec
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

# Which input each output has the shape and dtype of.
_OUTPUTS_LIKE = {PAGED_ATTENTION.name: ("q", "kv_cache"), MOE_EXPERTS.name: ("x",)}
_TORCH_TYPES = {"int": "int", "float": "float", "string": "str"}


@functools.cache
def _torch_op(spec: OpSpec) -> Any:
    """Define `spec` in torch's operator registry, once a process."""
    tensors = [f"Tensor{'?' if tensor.optional else ''} {tensor.name}" for tensor in spec.inputs]
    numbers = [f"{_TORCH_TYPES[attribute.type]} {attribute.name}" for attribute in spec.attributes]
    outputs = ", ".join("Tensor" for _ in spec.outputs)
    name = f"{DOMAIN}::{spec.name}"
    torch.library.define(name, f"({', '.join(tensors + numbers)}) -> ({outputs})")
    names = [tensor.name for tensor in spec.inputs]
    sources = [names.index(name) for name in _OUTPUTS_LIKE[spec.name]]

    def fake(*args: Any) -> Any:
        results = [args[source].new_empty(args[source].shape) for source in sources]
        return results[0] if len(results) == 1 else tuple(results)

    torch.library.register_fake(name, fake)
    return getattr(getattr(torch.ops, DOMAIN), spec.name).default


def call(
    spec: OpSpec, inputs: Sequence[torch.Tensor | None], **attributes: AttributeValue
) -> tuple[torch.Tensor, ...]:
    """Call the operator while tracing, optional inputs at the end left out or None; returns its outputs."""
    values = spec.node_attributes(**attributes)
    missing = [None] * (len(spec.inputs) - len(inputs))
    result = _torch_op(spec)(*inputs, *missing, *(values[attribute.name] for attribute in spec.attributes))
    return result if isinstance(result, tuple) else (result,)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """How torch.onnx.export writes the operators. Every linear projection becomes a Linear node."""
    table = {_torch_op(spec): _translation(spec) for spec in (PAGED_ATTENTION, MOE_EXPERTS)}
    table[torch.ops.aten.linear.default] = _translation(LINEAR)
    return table


def _translation(spec: OpSpec) -> Callable[..., Any]:
    spec.register_schema()
    node = getattr(onnxscript.values.Opset(DOMAIN, OPSET_VERSION), spec.name)
    inputs = [tensor.name for tensor in spec.inputs]
    attributes = [attribute.name for attribute in spec.attributes]

    def translate(*args: Any, **named: Any) -> Any:
        values = dict(zip(inputs + attributes, args, strict=False)) | named
        numbers = spec.node_attributes(**{name: values[name] for name in attributes})
        return node(*(values.get(name) for name in inputs), **numbers)

    # The exporter reads the parameters' names and order from the signature.
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for name in inputs + attributes
    ]
    translate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return translate

"""The sizes of a model that memory and time follow from, taken from the model itself.

Which matmuls ranks can share is found by calling the model once on the meta device: an attention module is
one that calls attention, and the last matmul of a module is the one that leads back to the hidden state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.pytorch_utils import Conv1D

from trtforge.builder.experts import is_experts
from trtforge.builder.hooks import Step
from trtforge.builder.trace import record_attention
from trtforge.errors import ExportError
from trtforge.manifest import LayerCache


@dataclass(frozen=True, slots=True)
class Matmul:
    """y = W x with W [out_features, in_features].

    Tensor-parallel ranks share the dimension `sharded`: by heads if `per_head` or `per_kv_head` says how many
    of its features belong to each, else in `parts` equal parts (gate and up are two) that are all cut alike.
    """

    out_features: int
    in_features: int
    element_bytes: int
    sharded: Literal["out", "in"] | None = None  # None: every rank has all of it
    per_head: int = 0
    per_kv_head: int = 0
    parts: int = 1
    copies: int = 1  # experts
    active: int = 1  # copies that one token uses
    is_quantized: bool = True  # False: keeps its dtype under --fp8 and --int4


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer."""

    num_heads: int  # of queries
    cache: LayerCache
    matmuls: tuple[Matmul, ...]
    other_bytes: int  # norms, biases, routers without a module of their own kind: all of it on every rank


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's sizes; bytes are those of the dtype that it was built with."""

    architecture: str
    num_parameters: int
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    embedding_bytes: int
    head_bytes: int  # of the output embedding
    is_tied: bool  # input and output embedding are one
    other_bytes: int  # what belongs to no layer, such as the last norm

    @property
    def window(self) -> int | None:
        """Tokens that the layer with the longest view sees; None if a layer sees all."""
        windows = [layer.cache.window for layer in self.layers]
        return max(windows) if all(windows) else None


def measure(hf: Any) -> ModelShape:
    """The sizes of the meta model `hf`. Raises ExportError for a model that the builder cannot trace."""
    called: dict[torch.nn.Module, int] = {}  # modules that multiply, in order, and experts a token

    def on_call(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        called.setdefault(module, _num_active(args))

    handles = [module.register_forward_pre_hook(on_call) for module in hf.modules() if _multiplies(module)]
    try:
        step = record_attention(hf)
    finally:
        for handle in handles:
            handle.remove()
    parameters = dict(hf.named_parameters())
    embedding, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    layers = _layers(hf, step, called, parameters)
    everything = sum(_nbytes(parameter) for parameter in parameters.values())
    in_layers = sum(layer.other_bytes + _matmul_bytes(layer.matmuls) for layer in layers)
    is_tied = embedding is head
    outside = _nbytes(embedding) + (0 if is_tied else _nbytes(head))
    return ModelShape(
        architecture=type(hf).__name__,
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
        hidden_size=head.shape[1],
        vocab_size=head.shape[0],
        layers=layers,
        embedding_bytes=_nbytes(embedding),
        head_bytes=_nbytes(head),
        is_tied=is_tied,
        other_bytes=everything - in_layers - outside,
    )


def _multiplies(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D) or is_experts(module)


def _num_active(args: tuple[torch.Tensor, ...]) -> int:
    """Experts a token of a call with hidden_states, top_k_index and top_k_weights; 1 of any other call."""
    return int(args[1].shape[-1]) if len(args) > 1 else 1


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _matmul_bytes(matmuls: Iterable[Matmul]) -> int:
    return sum(
        matmul.copies * matmul.out_features * matmul.in_features * matmul.element_bytes for matmul in matmuls
    )


def _layers(
    hf: Any,
    step: Step,
    called: Mapping[torch.nn.Module, int],
    parameters: Mapping[str, torch.nn.Parameter],
) -> tuple[Layer, ...]:
    names = {module: name for name, module in hf.named_modules()}
    prefixes = [_layer_prefix(names[module]) for module, _ in step.callers]
    if len(set(prefixes)) != len(prefixes):
        raise ExportError(f"{hf.config.model_type} attends more than once in a layer: it cannot be planned")
    layers = []
    for prefix, cache, (attention, num_heads) in zip(prefixes, step.layers, step.callers, strict=True):
        groups: dict[str, list[torch.nn.Module]] = defaultdict(list)
        for module in called:
            if names[module].startswith(prefix):
                parent = names[module] if is_experts(module) else names[module].rpartition(".")[0]
                groups[parent].append(module)
        matmuls: list[Matmul] = []
        for parent, modules in groups.items():
            if parent == names[attention]:
                matmuls += _attention_matmuls(modules, num_heads, cache)
            elif is_experts(modules[0]):
                matmuls += _expert_matmuls(modules[0], called[modules[0]])
            else:
                matmuls += _mlp_matmuls(modules)
        in_layer = sum(_nbytes(value) for name, value in parameters.items() if name.startswith(prefix))
        layers.append(Layer(num_heads, cache, tuple(matmuls), in_layer - _matmul_bytes(matmuls)))
    return tuple(layers)


def _layer_prefix(name: str) -> str:
    """Of "model.layers.3.self_attn": "model.layers.3."."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        raise ExportError(f"{name} is in no numbered layer: the model cannot be planned")
    return ".".join(parts[: number + 1]) + "."


def _sizes(module: Any) -> tuple[int, int]:
    """Output and input features; Conv1D has its weight the other way round."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _attention_matmuls(modules: list[Any], num_heads: int, cache: LayerCache) -> list[Matmul]:
    """Projections by heads; what leads to a latent that all heads share stays whole."""
    *projections, output = modules
    hidden, out_in = _sizes(output)
    num_kv, dim = cache.num_kv_heads, cache.head_dim
    result = []
    for module in projections:
        out_features, in_features = _sizes(module)
        size = module.weight.element_size()
        heads, kv_heads = 0, 0
        if out_features == num_heads * dim:
            heads = dim
        elif out_features == num_kv * dim:
            kv_heads = dim
        elif out_features == (num_heads + 2 * num_kv) * dim:
            heads, kv_heads = dim, 2 * dim
        elif in_features != hidden and out_features % num_heads == 0:
            heads = out_features // num_heads
        sharded: Literal["out"] | None = "out" if heads or kv_heads else None
        result.append(Matmul(out_features, in_features, size, sharded, heads, kv_heads))
    size = output.weight.element_size()
    result.append(Matmul(hidden, out_in, size, "in", per_head=out_in // num_heads))
    return result


def _mlp_matmuls(modules: list[Any]) -> list[Matmul]:
    """Everything up to the intermediate state by rows, the way back by columns; a lone matmul is a router."""
    if len(modules) == 1:
        out_features, in_features = _sizes(modules[0])
        size = modules[0].weight.element_size()
        return [Matmul(out_features, in_features, size, is_quantized=False)]
    *into, back = modules
    hidden, intermediate = _sizes(back)
    result = []
    for module in into:
        out_features, in_features = _sizes(module)
        parts, rest = divmod(out_features, intermediate)
        size = module.weight.element_size()
        result.append(Matmul(out_features, in_features, size, None if rest else "out", parts=max(parts, 1)))
    return [*result, Matmul(hidden, intermediate, back.weight.element_size(), "in")]


def _expert_matmuls(module: Any, num_active: int) -> list[Matmul]:
    """Every expert is cut as an MLP is, so that each rank has a part of all experts."""
    gate_up, down = module.gate_up_proj, module.down_proj
    copies, out_features, in_features = gate_up.shape
    _, hidden, intermediate = down.shape
    if module.is_transposed:
        out_features, in_features = in_features, out_features
        hidden, intermediate = intermediate, hidden
    size, counts = gate_up.element_size(), {"copies": copies, "active": num_active}
    return [
        Matmul(out_features, in_features, size, "out", parts=2, **counts),
        Matmul(hidden, intermediate, size, "in", **counts),
    ]

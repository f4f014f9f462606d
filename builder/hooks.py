"""What Hugging Face modeling code calls while it is traced: masks, attention, experts, rotary embedding.

Transformers dispatches attention and experts through registries, and every modeling file takes masks and
the rotary function from its own namespace, so that no model needs code of its own here.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trtforge.builder import rotary
from trtforge.builder.experts import is_experts, recognize_activation
from trtforge.builder.torch_ops import call
from trtforge.errors import ExportError
from trtforge.manifest import LayerCache
from trtforge.plugins.moe_experts.op import MOE_EXPERTS
from trtforge.plugins.paged_attention.op import PAGED_ATTENTION

_one_at_a_time = threading.Lock()

_IMPLEMENTATION = "trtforge"
_ROTARY = "apply_rotary_pos_emb"

# Arguments that change nothing in a graph that is packed, paged and for inference.
_HARMLESS_ATTENTION_ARGUMENTS = {"dropout", "position_ids", "cache_position", "use_cache", "logits_to_keep"}
_HARMLESS_MASK_ARGUMENTS = {"config", "inputs_embeds", "position_ids", "cache_position", "layer_idx"}
_HARMLESS_MASK_ARGUMENTS |= {"allow_is_causal_skip"}

_WINDOW_OF_MASK: dict[str, Callable[[Any], int]] = {
    "create_causal_mask": lambda config: 0,
    "create_sliding_window_causal_mask": lambda config: config.sliding_window,
}


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Stands for a mask on its way from where a model makes it to the attention that uses it."""

    window: int  # tokens that a token sees, itself included; 0: all before it


@dataclass(slots=True)
class Step:
    """Inputs of one forward pass that its attention layers share, and what they leave behind.

    With `kv_caches` None the pass only records `layers`: the shapes that the attention calls bring.
    """

    block_tables: torch.Tensor  # [B, max_blocks]
    cu_seqlens: torch.Tensor  # [B + 1]
    context_lens: torch.Tensor  # [B]
    slot_mapping: torch.Tensor  # [T]
    kv_caches: list[torch.Tensor] | None  # a layer: [num_blocks, 2, block_size, Hkv, D]
    kv_caches_out: list[torch.Tensor] = field(default_factory=list)
    layers: list[LayerCache] = field(default_factory=list)
    # Of each layer, the module that called attention and its number of query heads.
    callers: list[tuple[torch.nn.Module, int]] = field(default_factory=list)


class Hooks:
    """The functions that stand in for the model's own while `installed`; every pass sets `step`."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._model_type = hf.config.model_type
        # Found before tracing, when numbers can still be looked at.
        self._activations = {
            id(module): recognize_activation(module) for module in hf.modules() if is_experts(module)
        }
        self.step: Step | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put the hooks in place; on leaving, also by an exception, everything is as it was.

        They are process-wide, so that models can be traced only one after the other; raises ExportError
        while another one is.
        """
        if not _one_at_a_time.acquire(blocking=False):
            raise ExportError("another model is being traced in this process; trace one after the other")
        config = self._hf.config
        with contextlib.ExitStack() as stack:
            stack.callback(_one_at_a_time.release)
            for registry, function in (
                (ALL_ATTENTION_FUNCTIONS, self._attention),
                (ALL_EXPERTS_FUNCTIONS, self._experts),
            ):
                stack.enter_context(_replaced(registry._global_mapping, _IMPLEMENTATION, function))
            for namespace in self._modeling_namespaces():
                for name, function in self._stand_ins(namespace).items():
                    stack.enter_context(_replaced(namespace, name, function))
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._attn_implementation = _IMPLEMENTATION
            config._experts_implementation = _IMPLEMENTATION
            yield

    def _modeling_namespaces(self) -> list[dict[str, Any]]:
        names = {type(module).__module__ for module in self._hf.modules()}
        return [vars(sys.modules[name]) for name in sorted(names) if name.startswith("transformers.models.")]

    def _stand_ins(self, namespace: dict[str, Any]) -> dict[str, Callable[..., Any]]:
        result = {}
        for name, function in namespace.items():
            if name == _ROTARY:
                result[name] = self._rotary_hook(function)
            elif name.startswith("create_") and name.endswith("_mask") and callable(function):
                result[name] = self._mask_hook(name, function)
        return result

    # ------------------------------------------------------------------ masks

    def _mask_hook(self, name: str, function: Callable[..., Any]) -> Callable[..., CausalMask | None]:
        def create_mask(*args: Any, **kwargs: Any) -> CausalMask | None:
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            config = arguments["config"]
            if name not in _WINDOW_OF_MASK or not getattr(config, "is_causal", True):
                raise ExportError(
                    f"{self._model_type} attends through {name}; only causal masks, with or without a "
                    "sliding window, can be served from a paged cache"
                )
            names = arguments.keys() - _HARMLESS_MASK_ARGUMENTS
            special = sorted(key for key in names if arguments[key] is not None)
            if special:
                raise ExportError(f"{self._model_type} changes its causal mask by {', '.join(special)}")
            if self.step is None or self.step.kv_caches is None:
                return None  # a model with attention of its own, which would use it, is still to be found out
            return CausalMask(window=_WINDOW_OF_MASK[name](config))

        return create_mask

    # ------------------------------------------------------------------ attention

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # [T, H, 1, D]
        key: torch.Tensor,  # [T, Hkv, 1, D]
        value: torch.Tensor,  # [T, Hkv, 1, Dv]
        attention_mask: CausalMask | torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        step = self.step
        if step is None:
            raise ExportError("attention was called outside of a traced step")
        self._check_attention(module, attention_mask, is_causal, others)
        # The mask is what counts in eager mode; not every model also passes the window to attention.
        window = attention_mask.window if isinstance(attention_mask, CausalMask) else sliding_window
        head_dim, value_dim = key.shape[3], value.shape[3]
        if value_dim > head_dim:
            raise ExportError(
                f"{self._model_type}: values of {value_dim} elements a head are wider than keys of {head_dim}"
            )
        if value_dim < head_dim:  # multi-head latent attention; the cache has room for the wider keys
            value = torch.nn.functional.pad(value, (0, head_dim - value_dim))
        q, k, v = query.squeeze(2), key.squeeze(2), value.squeeze(2)
        layer = len(step.layers)
        step.layers.append(LayerCache(num_kv_heads=k.shape[1], head_dim=head_dim, window=int(window or 0)))
        step.callers.append((module, q.shape[1]))
        if step.kv_caches is None:
            out = torch.empty_like(q)
        else:
            tables = (step.block_tables, step.cu_seqlens, step.context_lens, step.slot_mapping)
            out, cache = call(
                PAGED_ATTENTION,
                (q, k, v, step.kv_caches[layer], *tables, s_aux),
                scale=float(head_dim**-0.5 if scaling is None else scaling),
                window=int(window or 0),
                softcap=float(softcap or 0.0),
            )
            step.kv_caches_out.append(cache)
        return out[..., :value_dim].unsqueeze(1), None  # [T, 1, H, Dv]

    def _check_attention(
        self,
        module: torch.nn.Module,
        attention_mask: CausalMask | torch.Tensor | None,
        is_causal: bool | None,
        others: dict[str, Any],
    ) -> None:
        where = f"{self._model_type}: {type(module).__name__}"
        if not (attention_mask is None or isinstance(attention_mask, CausalMask)):
            raise ExportError(f"{where} brings a mask of its own, which a packed graph has no place for")
        if is_causal is False or not getattr(module, "is_causal", True):
            raise ExportError(f"{where} is not causal; only decoders can be served from a paged cache")
        names = others.keys() - _HARMLESS_ATTENTION_ARGUMENTS
        unknown = sorted(name for name in names if others[name] is not None and others[name] is not False)
        if unknown:
            raise ExportError(f"{where} gives attention {', '.join(unknown)}, which is not supported")

    # ------------------------------------------------------------------ mixture of experts

    def _experts(
        self,
        module: Any,
        hidden_states: torch.Tensor,  # [T, hidden]
        top_k_index: torch.Tensor,  # [T, k]
        top_k_weights: torch.Tensor,  # [T, k]
    ) -> torch.Tensor:
        biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
        inputs = (hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, *biases)
        attributes = self._activations[id(module)] | {"transposed": int(module.is_transposed)}
        (out,) = call(MOE_EXPERTS, inputs, **attributes)
        return out

    # ------------------------------------------------------------------ rotary embedding

    def _rotary_hook(self, function: rotary.Rotate) -> rotary.Rotate:
        convention = rotary.recognize(function)
        does_partial = convention == rotary.recognize(function, partial=True)
        unknown = f"{self._model_type}: its {_ROTARY} follows a rotation convention that is not known here"

        def apply_rotary_pos_emb(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if convention is None or len(args) != 4 or options:
                raise ExportError(unknown)
            q, k, cos, sin = args  # [T, H, 1, D], [T, Hkv, 1, D], two of [T, 1, R or R / 2]
            cos, sin = convention.angles(cos), convention.angles(sin)
            if 2 * cos.shape[-1] != q.shape[-1] and not does_partial:
                raise ExportError(unknown)
            return _rotate(q, cos, sin, convention.interleaved), _rotate(k, cos, sin, convention.interleaved)

        return apply_rotary_pos_emb


def _rotate(
    x: torch.Tensor,  # [T, H, 1, D]
    cos: torch.Tensor,  # [T, 1, R / 2]
    sin: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    size = 2 * cos.shape[-1]
    dtype = torch.promote_types(x.dtype, cos.dtype)
    turned = torch.onnx.ops.rotary_embedding(
        x.to(dtype),
        cos.to(dtype),
        sin.to(dtype),
        interleaved=interleaved,
        rotary_embedding_dim=0 if size == x.shape[-1] else size,
    )
    return turned.to(x.dtype)


@contextlib.contextmanager
def _replaced(mapping: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """`mapping[key]` is `value` within the block and what it was before after it."""
    missing = object()
    before = mapping.get(key, missing)
    mapping[key] = value
    try:
        yield
    finally:
        if before is missing:
            del mapping[key]
        else:
            mapping[key] = before

"""A Hugging Face model without weights: modules on the meta device, small computed buffers real."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import build_glob_alternation

from trtforge.errors import ExportError

# Their frequencies depend on the longest sequence of a batch, so that requests would change each other.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def build_meta_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of `config` in eval mode, its parameters on the meta device with `dtype`.

    Buffers that no checkpoint stores (such as inverse frequencies) have their real values, on the CPU.
    Raises ExportError if the model type is no decoder or cannot be expressed with packed sequences.
    """
    config = copy.deepcopy(config)
    if config.is_encoder_decoder:
        raise ExportError(f"{config.model_type} is an encoder-decoder model; only decoders are supported")
    try:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise ExportError(f"transformers has no decoder for {config.model_type}: {error}") from None
    _refuse_batch_dependent_rope(hf)
    _keep_float32(hf, dtype)
    _compute_buffers(hf)
    # With a padding token transformers looks for it among the ids, which have no values here.
    hf.config.get_text_config(decoder=True).pad_token_id = None
    return hf


def _refuse_batch_dependent_rope(hf: Any) -> None:
    for module in hf.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in _BATCH_DEPENDENT_ROPE:
                raise ExportError(
                    f"{hf.config.model_type} with rope type {kind!r} is not supported: its frequencies "
                    "depend on the longest sequence of a batch"
                )


def _keep_float32(hf: Any, dtype: torch.dtype) -> None:
    """Give parameters and buffers that the model wants in float32 whatever its dtype that dtype."""
    patterns = list(hf._get_dtype_plan(dtype))
    if not patterns:
        return
    wanted, _, _ = build_glob_alternation(patterns)
    for name, tensor in hf.state_dict(keep_vars=True).items():
        if wanted.search(name):
            tensor.data = tensor.data.float()


def _compute_buffers(hf: Any) -> None:
    """Give buffers outside the checkpoint their values, as from_pretrained does after loading."""
    names = [name for name, _ in hf.named_non_persistent_buffers()]
    for name in names:
        module_name, _, buffer_name = name.rpartition(".")
        buffers = hf.get_submodule(module_name)._buffers
        empty = torch.empty_like(buffers[buffer_name], device="cpu")
        # A value that no initialization leaves behind shows what was forgotten.
        buffers[buffer_name] = empty.fill_(torch.nan if empty.is_floating_point() else 0)
    with torch.no_grad():
        hf.initialize_weights()
    for name in names:
        buffer = hf.get_buffer(name)
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ExportError(f"{hf.config.model_type}: transformers does not say how to compute {name}")

"""Scales that NVIDIA ModelOpt finds by what a model reads: of AWQ (arXiv 2306.00978), of static activations,
and of SmoothQuant (arXiv 2211.10438).

The whole model is loaded and run on the calibration texts. What comes out are the scales alone: weights are
divided by those of inputs when the build rounds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.quantization.calibration_texts import MODELOPT, texts_digest
from trtforge.builder.quantization.policy import Calibration, Quantization
from trtforge.builder.quantization.recipes import (
    make_recipe,
    pack_scales,
    read_scales,
    unpack_scales,
)
from trtforge.errors import ConfigError, ExportError

_TOOLS = (MODELOPT, "torch", "transformers")
_NUM_SEQUENCES, _SEQUENCE_TOKENS = 32, 256
_BATCH = 16  # sequences; with each batch AWQ rounds all weights again, for each scale that it tries


def default_cache_folder() -> Path:
    """Where scales are kept for later builds."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root) / "trtforge" / "calibration"


def calibrate(
    checkpoint: Checkpoint,
    quantization: Quantization,
    texts: list[str],
    cache: Path,
    on_progress: Callable[[int, int], None],
) -> Calibration:
    """AWQ's scales for weights of int4, else those of static activations: with SmoothQuant's for int8.

    They are kept in `cache`, and found there if the same is asked for again. `on_progress(done, total)`
    counts sequences of `texts` that the model has read. Raises ConfigError for texts that are too short or a
    model without groups, and ExportError for what ModelOpt cannot do.
    """
    if checkpoint.gguf is not None:
        raise ConfigError(
            "calibration loads the model by transformers: give its Hugging Face folder instead of "
            f"{checkpoint.gguf}"
        )
    file = cache / f"{_key(checkpoint.content_key(), quantization, texts)}.safetensors"
    if not file.is_file():
        try:
            with _quiet():
                found = _calibrate(checkpoint, quantization, texts, on_progress)
        except ConfigError:
            raise
        except Exception as error:  # ModelOpt, and modeling code under it, raise nearly everything
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ExportError(f"{MODELOPT} cannot calibrate {checkpoint.path}: {reason}") from error
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as scratch:
            save_file(dict(pack_scales(found)), Path(scratch, file.name))
            Path(scratch, file.name).replace(file)
    return unpack_scales(load_file(file))


def _key(content_key: str, quantization: Quantization, texts: list[str]) -> str:
    parts = {
        "content": content_key,
        "format": quantization.format,
        "group_size": quantization.group_size,
        "exclude": quantization.exclude,
        "texts": texts_digest(texts),
        "sizes": [_NUM_SEQUENCES, _SEQUENCE_TOKENS],
        "tools": {name: metadata.version(name) for name in _TOOLS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _calibrate(
    checkpoint: Checkpoint,
    quantization: Quantization,
    texts: list[str],
    on_progress: Callable[[int, int], None],
) -> Calibration:
    import modelopt.torch.quantization as mtq

    dtype = _compute_dtype(getattr(torch, checkpoint.dtype))
    hf = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, trust_remote_code=False).eval()
    sequences = _sequences(checkpoint.path, texts)
    recipe = make_recipe(hf, quantization)
    total, done = recipe.num_passes * len(sequences), 0

    def run(model: Any) -> None:
        nonlocal done
        for batch in torch.split(sequences, _BATCH):
            model(batch, use_cache=False)
            done += len(batch)
            on_progress(min(done, total), total)

    with torch.no_grad():
        mtq.quantize(hf, recipe.config, run)
    return read_scales(hf, quantization)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the model is run in: float32, for twice the memory, on a CPU that takes many times as long for
    less."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in supported or supported[dtype]() else torch.float32


def _sequences(folder: Path, texts: list[str]) -> torch.Tensor:
    """[num_sequences, _SEQUENCE_TOKENS] of tokens, all texts one after the other, behind the tokenizer's own
    first ones: what <s> makes a model compute can be larger than all else."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    plain, prompt = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    first = prompt[: next((i for i in range(len(prompt)) if prompt[i:][: len(plain)] == plain), 0)]
    wanted = _NUM_SEQUENCES * _SEQUENCE_TOKENS
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text + "\n\n", add_special_tokens=False).input_ids
        if len(tokens) >= wanted:
            break
    num_sequences = min(len(tokens) // _SEQUENCE_TOKENS, _NUM_SEQUENCES)
    if num_sequences == 0:
        raise ConfigError(
            f"the calibration text has {len(tokens)} tokens: give at least {_SEQUENCE_TOKENS}, and better "
            f"{wanted}"
        )
    sequences = torch.tensor(tokens[: num_sequences * _SEQUENCE_TOKENS]).reshape(num_sequences, -1)
    return torch.cat([torch.tensor(first, dtype=torch.int64).expand(num_sequences, -1), sequences], 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ModelOpt prints and warns of, plugins that are not there, out of the build's output."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield

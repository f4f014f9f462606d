"""AWQ (arXiv 2306.00978), which NVIDIA ModelOpt computes: scales of inputs that protect what matters.

The whole model is loaded and run on the calibration texts. What comes out are the scales alone: weights are
divided by them when the build rounds them.
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

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.quantization.calibration_texts import MODELOPT, texts_digest
from trtforge.builder.quantization.policy import (
    InputScales,
    Quantization,
    check_exclusions,
    check_projections,
    choose_group_size,
    find_exclusion,
)
from trtforge.errors import ConfigError, ExportError

_TOOLS = (MODELOPT, "torch", "transformers")
_NUM_SEQUENCES, _SEQUENCE_TOKENS = 32, 256
_BATCH = 16  # sequences; with each batch ModelOpt rounds all weights again, for each scale that it tries


def default_cache_folder() -> Path:
    """Where scales are kept for later builds."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root) / "trtforge" / "awq"


def calibrate_awq(
    checkpoint: Checkpoint,
    quantization: Quantization,
    texts: list[str],
    cache: Path,
    on_progress: Callable[[int, int], None],
) -> InputScales:
    """What the inputs of each projection are multiplied by, by the name of its weight.

    They are kept in `cache`, and found there if the same is asked for again. `on_progress(done, total)`
    counts sequences of `texts` that the model has read. Raises ConfigError for texts that are too short or a
    model without groups, and ExportError for what ModelOpt cannot do.
    """
    if checkpoint.gguf is not None:
        raise ConfigError(
            "--calibrate awq loads the model by transformers: give its Hugging Face folder instead of "
            f"{checkpoint.gguf}"
        )
    file = cache / f"{_key(checkpoint.content_key(), quantization, texts)}.safetensors"
    if not file.is_file():
        try:
            with _quiet():
                scales = _calibrate(checkpoint, quantization, texts, on_progress)
        except ConfigError:
            raise
        except Exception as error:  # ModelOpt, and modeling code under it, raise nearly everything
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ExportError(f"{MODELOPT} cannot calibrate {checkpoint.path}: {reason}") from error
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as scratch:
            save_file(dict(scales), Path(scratch, file.name))
            Path(scratch, file.name).replace(file)
    found: InputScales = load_file(file)
    return found


def _key(content_key: str, quantization: Quantization, texts: list[str]) -> str:
    parts = {
        "content": content_key,
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
) -> InputScales:
    import modelopt.torch.quantization as mtq

    dtype = getattr(torch, checkpoint.dtype)
    hf = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, trust_remote_code=False).eval()
    sequences = _sequences(checkpoint.path, texts)
    # It runs the model once to collect statistics and once to search.
    total, done = 2 * len(sequences), 0

    def run(model: Any) -> None:
        nonlocal done
        for batch in torch.split(sequences, _BATCH):
            model(batch, use_cache=False)
            done += len(batch)
            on_progress(min(done, total), total)

    with torch.no_grad():
        mtq.quantize(
            hf, {"quant_cfg": _recipe(hf, quantization), "algorithm": mtq.INT4_AWQ_CFG["algorithm"]}, run
        )
    # Not by ModelOpt's export, which gives q, k and v a common scale that fits none of them.
    found = {}
    for name, module in hf.named_modules():
        scale = getattr(getattr(module, "input_quantizer", None), "pre_quant_scale", None)
        if scale is not None:
            found[f"{name}.weight"] = np.ascontiguousarray(scale.detach().float().reshape(-1).numpy())
    return found


def _sequences(folder: Path, texts: list[str]) -> torch.Tensor:
    """[num_sequences, _SEQUENCE_TOKENS] of tokens, all texts one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
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
    return torch.tensor(tokens[: num_sequences * _SEQUENCE_TOKENS]).reshape(num_sequences, -1)


def _recipe(hf: Any, quantization: Quantization) -> list[dict[str, Any]]:
    """ModelOpt's settings: everything off but the weights of projections that have groups."""
    check_exclusions([name for name, _ in hf.named_parameters()], quantization.exclude)
    embedding = hf.get_output_embeddings()
    linears = {
        name: module.in_features
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not embedding
        and find_exclusion(f"{name}.weight", quantization.exclude) is None
    }
    sizes = {name: choose_group_size(columns, quantization.group_size) for name, columns in linears.items()}
    check_projections({f"{name}.weight": columns for name, columns in linears.items()}, quantization)
    recipe: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, size in sizes.items():
        if size is not None:
            settings = {"num_bits": 4, "block_sizes": {-1: size, "type": "static"}}
            recipe.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": settings})
    return recipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ModelOpt prints and warns of, plugins that are not there, out of the build's output."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield

"""AWQ (arXiv 2306.00978), which NVIDIA ModelOpt computes: scales of inputs that protect what matters.

The whole model is loaded and run on the calibration texts. What comes out is a checkpoint that is quantized
already, in ModelOpt's format, and is built like any other of these.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.quantization.calibration_texts import MODELOPT, texts_digest
from trtforge.builder.quantization.policy import (
    Quantization,
    check_exclusions,
    choose_group_size,
    find_exclusion,
)
from trtforge.errors import ConfigError, ExportError
from trtforge.plugins.int4_gemm.op import GROUP_SIZES

_TOOLS = (MODELOPT, "torch", "transformers")
_NUM_SEQUENCES, _SEQUENCE_TOKENS = 32, 256
_BATCH = 16  # sequences; with each batch ModelOpt rounds all weights again, for each scale that it tries


def default_cache_folder() -> Path:
    """Where calibrated checkpoints are kept for later builds."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(root) / "trtforge" / "awq"


def calibrate_awq(
    checkpoint: Checkpoint,
    quantization: Quantization,
    texts: list[str],
    cache: Path,
    on_progress: Callable[[int, int], None],
) -> Path:
    """A folder with the model of `checkpoint` in int4.

    It is kept in `cache`, and found there if the same is asked for again. `on_progress(done, total)` counts
    sequences of `texts` that the model has read. Raises ConfigError for texts that are too short or a model
    without groups, and ExportError for what ModelOpt cannot do.
    """
    if checkpoint.gguf is not None:
        raise ConfigError(
            "--calibrate awq loads the model by transformers: give its Hugging Face folder instead of "
            f"{checkpoint.gguf}"
        )
    folder = cache / _key(checkpoint.content_key(), quantization, texts)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as scratch:
        work = Path(scratch, "model")
        try:
            with _quiet():
                _calibrate(checkpoint, quantization, texts, work, on_progress)
        except ConfigError:
            raise
        except Exception as error:  # ModelOpt, and modeling code under it, raise nearly everything
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ExportError(f"{MODELOPT} cannot calibrate {checkpoint.path}: {reason}") from error
        if not folder.is_dir():  # another build may have been faster
            work.rename(folder)
    return folder


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
    folder: Path,
    on_progress: Callable[[int, int], None],
) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

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
        export_hf_checkpoint(hf, export_dir=folder)


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
    """ModelOpt's settings: everything off but the weights of projections that have groups.

    All get groups of one size, which the checkpoint's format asks for: the largest that divides most.
    """
    check_exclusions([name for name, _ in hf.named_parameters()], quantization.exclude)
    embedding = hf.get_output_embeddings()
    linears = {
        name: module.in_features
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not embedding
        and find_exclusion(f"{name}.weight", quantization.exclude) is None
    }
    sizes = [choose_group_size(columns, quantization.group_size) for columns in linears.values()]
    size = min((size for size in sizes if size is not None), default=None)
    if size is None:
        raise ConfigError(f"--calibrate awq: no projection is divided by groups of {GROUP_SIZES} columns")
    settings = {"num_bits": 4, "block_sizes": {-1: size, "type": "static"}}
    recipe: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, columns in linears.items():
        if columns % size == 0:
            recipe.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": settings})
    return recipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ModelOpt prints and warns of, plugins that are not there, out of the build's output."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield

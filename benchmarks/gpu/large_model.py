"""A random model of 8B parameters through the reference executor with our kernels: tokens a second beside
transformers' generate. Twice its 16 GB are written to the folder for temporary files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from export import CONFIGS, write_sparse_checkpoint
from gpu.model import load, rates_table
from gpu.part import Outcome, Settings, run_part

PATTERN_BYTES = 64 * 2**20


def bench_large_model(settings: Settings) -> Outcome:
    """A table; the tokens mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "llama-8b"
        checkpoint.mkdir()
        _write_random_checkpoint(checkpoint, settings.model)
        executor = load(checkpoint, Path(folder) / "repository", settings)
        return Outcome(tables=[rates_table(executor, checkpoint, "random Llama 8B")])


def _write_random_checkpoint(folder: Path, tokenizer: Path | None) -> None:
    """Holes in the file filled with one pattern over and over: true sizes, and no zeros, on which a GPU is
    faster."""
    write_sparse_checkpoint(CONFIGS["llama-8b"], folder)
    pattern = (torch.randn(PATTERN_BYTES // 2) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    path = folder / "model.safetensors"
    with path.open("r+b") as stream:
        header_bytes = 8 + int.from_bytes(stream.read(8), "little")
        for begin in range(header_bytes, path.stat().st_size, PATTERN_BYTES):
            stream.seek(begin)
            stream.write(pattern[: path.stat().st_size - begin])
    if tokenizer is not None:  # a build needs one; no text goes through it here
        for file in tokenizer.glob("token*"):
            shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    run_part(__doc__, bench_large_model)

"""Whole models through the reference executor with our kernels: a small real one, whose tokens are compared
with transformers', and a random one of 8B parameters; tokens a second beside transformers' generate."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from export import CONFIGS, write_sparse_checkpoint
from gpu.part import Cell, Outcome, Settings, Table, run_part
from transformers import AutoConfig, AutoModelForCausalLM

from trtforge.builder.build import build
from trtforge.builder.options import BuildOptions
from trtforge.manifest import Manifest
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launcher import Launcher
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

PROMPT_LEN, NUM_STEPS, BLOCK_SIZE = 128, 32, 32
BATCHES = (1, 8, 32, 128)
PATTERN_BYTES = 64 * 2**20
# Steps whose likeliest token may differ from transformers' float32 model: near-ties in bfloat16.
MIN_AGREEMENT = 0.9


def bench_models(settings: Settings) -> Outcome:
    """Both models; without --model the random one alone, which is a problem."""
    problems: list[str] = []
    rows: list[tuple[Cell, ...]] = []
    facts: list[str] = []
    launcher = Launcher(Bundle.load(settings.bundle))
    with tempfile.TemporaryDirectory() as folder:
        if settings.model is None:
            problems.append("no --model was given: no real model was run")
        else:
            executor = _load(settings.model, Path(folder) / "small", launcher)
            agreement = _agreement(executor, settings.model)
            fact = f"{settings.model.name}: {100 * agreement:.1f} % of the greedy tokens are those of float32"
            (facts if agreement >= MIN_AGREEMENT else problems).append(fact)
            rows += _rows(executor, settings.model, settings.model.name)
            executor.close()
        checkpoint = Path(folder) / "llama-8b"
        checkpoint.mkdir()
        _write_random_checkpoint(checkpoint, settings.model)
        executor = _load(checkpoint, Path(folder) / "large", launcher)
        rows += _rows(executor, checkpoint, "random Llama 8B")
    columns = ("model", "sequences", "prefill, tok/s", "decode, tok/s", "transformers' decode, tok/s")
    title = f"Reference executor, bfloat16, prompts of {PROMPT_LEN} tokens, {NUM_STEPS} steps"
    return Outcome(problems, [Table(title, columns, rows)], facts)


def _load(checkpoint: Path, repository: Path, launcher: Launcher) -> ReferenceExecutor:
    options = BuildOptions(
        model=str(checkpoint),
        output=repository,
        runtime="reference",
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        max_model_len=1024,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=max(BATCHES) * PROMPT_LEN,
        kv_cache_bytes=8 * 2**30,
    )
    folder = build(options).folder / "1"
    return ReferenceExecutor(folder, Manifest.load(folder), launcher=launcher)


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


def _rows(executor: ReferenceExecutor, checkpoint: Path, name: str) -> list[tuple[Cell, ...]]:
    vocab_size = AutoConfig.from_pretrained(checkpoint).vocab_size
    rows: list[tuple[Cell, ...]] = []
    for batch in BATCHES:
        prompts = np.random.default_rng(batch).integers(vocab_size, size=(batch, PROMPT_LEN))
        _generate(executor, prompts, 4)  # captures the graph of this batch
        prefill_s, decode_s, _ = _generate(executor, prompts, NUM_STEPS)
        prefill, decode = batch * PROMPT_LEN / prefill_s, batch * (NUM_STEPS - 1) / decode_s
        rows.append((name, batch, prefill, decode, _time_transformers(checkpoint, prompts)))
    return rows


def _generate(
    executor: ReferenceExecutor, prompts: np.ndarray, num_steps: int
) -> tuple[float, float, np.ndarray]:
    """Seconds of the prefill and of the other steps, and the greedy tokens [sequences, steps]."""
    begin = time.perf_counter()
    tokens = [_step(executor, prompts, 0)]
    prefilled = time.perf_counter()
    for step in range(1, num_steps):
        tokens.append(_step(executor, tokens[-1][:, None], prompts.shape[1] + step - 1))
    return prefilled - begin, time.perf_counter() - prefilled, np.stack(tokens, axis=1)


def _step(executor: ReferenceExecutor, new_tokens: np.ndarray, past: int) -> np.ndarray:
    """Give every sequence its new tokens; returns each one's next."""
    num_seqs, num_new = new_tokens.shape
    max_blocks = 1024 // BLOCK_SIZE
    tables = np.arange(num_seqs * max_blocks, dtype=np.int32).reshape(num_seqs, max_blocks)
    positions = np.arange(past, past + num_new, dtype=np.int32)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    outputs = executor.execute(
        ModelInputs(
            input_ids=new_tokens.ravel().astype(np.int32),
            position_ids=np.tile(positions, num_seqs),
            block_tables=tables,
            cu_seqlens=np.arange(num_seqs + 1, dtype=np.int32) * num_new,
            context_lens=np.full(num_seqs, past + num_new, np.int32),
            slot_mapping=slots.ravel().astype(np.int32),
            logits_indices=np.arange(1, num_seqs + 1, dtype=np.int32) * num_new - 1,
        )
    )
    if outputs.argmax is None:
        raise TypeError("the reference executor gives the likeliest tokens")
    return outputs.argmax.copy()


def _agreement(executor: ReferenceExecutor, checkpoint: Path) -> float:
    """Share of tokens that transformers, given the same ones before, finds the likeliest too."""
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).cuda().eval()
    prompts = np.random.default_rng(0).integers(hf.config.vocab_size, size=(8, PROMPT_LEN))
    *_, tokens = _generate(executor, prompts, NUM_STEPS)
    texts = torch.from_numpy(np.concatenate([prompts, tokens], axis=1)).cuda()
    with torch.inference_mode():
        expected = hf(texts).logits.argmax(dim=-1)[:, PROMPT_LEN - 1 : -1]
    return float((expected.cpu().numpy() == tokens).mean())


def _time_transformers(checkpoint: Path, prompts: np.ndarray) -> float:
    """Tokens a second of generate, its prefill taken off."""
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cuda").eval()
    ids = torch.from_numpy(prompts).cuda()

    def seconds(num_tokens: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        hf.generate(
            ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds(2)
    return len(prompts) * (NUM_STEPS - 1) / (seconds(NUM_STEPS) - seconds(1))


if __name__ == "__main__":
    run_part(__doc__, bench_models)

"""A real small model through the reference executor with our kernels: its tokens compared with transformers',
and tokens a second beside transformers' generate."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gpu.part import Cell, Outcome, Settings, Table, run_part
from transformers import AutoModelForCausalLM, PreTrainedModel

from trtforge.builder.build import build
from trtforge.builder.options import BuildOptions
from trtforge.manifest import Manifest
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.launcher import Launcher
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.reference_executor import ReferenceExecutor

PROMPT_LEN, NUM_STEPS, BLOCK_SIZE = 128, 32, 32
BATCHES = (1, 8, 32, 128)
# Steps whose likeliest token may differ from transformers' float32 model: near-ties in bfloat16.
MIN_AGREEMENT = 0.9


def bench_model(settings: Settings) -> Outcome:
    """The real one; without --model there is none, which is a problem."""
    if settings.model is None:
        return Outcome(["no --model was given: no real model was run"])
    with tempfile.TemporaryDirectory() as folder:
        executor = load(settings.model, Path(folder), settings)
        agreement = _agreement(executor, settings.model)
        fact = f"{settings.model.name}: {100 * agreement:.1f} % of the greedy tokens are those of float32"
        table = rates_table(executor, settings.model, settings.model.name)
    passed = agreement >= MIN_AGREEMENT
    return Outcome([] if passed else [fact], [table], [fact] if passed else [])


def rates_table(executor: ReferenceExecutor, checkpoint: Path, name: str) -> Table:
    """Tokens a second by the number of sequences."""
    columns = ("model", "sequences", "prefill, tok/s", "decode, tok/s", "transformers' decode, tok/s")
    title = f"Reference executor, bfloat16, prompts of {PROMPT_LEN} tokens, {NUM_STEPS} steps"
    return Table(title, columns, _rows(executor, checkpoint, name))


def load(checkpoint: Path, repository: Path, settings: Settings) -> ReferenceExecutor:
    """Build and load a model."""
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
    launcher = Launcher(Bundle.load(settings.bundle))
    return ReferenceExecutor(folder, Manifest.load(folder), launcher=launcher)


def _rows(executor: ReferenceExecutor, checkpoint: Path, name: str) -> list[tuple[Cell, ...]]:
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cuda").eval()
    rows: list[tuple[Cell, ...]] = []
    for batch in BATCHES:
        prompts = np.random.default_rng(batch).integers(hf.config.vocab_size, size=(batch, PROMPT_LEN))
        _generate(executor, prompts, 4)  # captures the graph of this batch
        prefill_s, decode_s, _ = _generate(executor, prompts, NUM_STEPS)
        prefill, decode = batch * PROMPT_LEN / prefill_s, batch * (NUM_STEPS - 1) / decode_s
        rows.append((name, batch, prefill, decode, _time_transformers(hf, prompts)))
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


def _time_transformers(hf: PreTrainedModel, prompts: np.ndarray) -> float:
    """Tokens a second of generate, its prefill taken off."""
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
    run_part(__doc__, bench_model)

"""Paged attention with the heads of Llama 3.1 8B: decode against the copy bandwidth, prefill against the
matrix rate, both beside torch's own attention on contiguous keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu.machine import measure_rates
from gpu.part import Cell, Outcome, Settings, Table, run_part
from gpu.timing import num_copies, time_each

from trtforge.plugins.bundle import Bundle
from trtforge.plugins.examples import attention_call
from trtforge.plugins.launcher import Launcher
from trtforge.plugins.operators import OPERATORS
from trtforge.runtime.executors.kernel_calls import KernelCalls

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 32
ATTRIBUTES = {"scale": HEAD_DIM**-0.5, "window": 0, "softcap": 0.0}
DECODES = ((1, 1024), (1, 16384), (8, 4096), (32, 1024), (32, 4096), (128, 4096), (256, 2048))
PREFILLS = (512, 2048, 8192)
CACHE_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Step:
    """Sequences that are alike."""

    num_seqs: int
    new: int  # tokens of a sequence
    context: int  # all of its tokens
    cache_dtype: torch.dtype = torch.bfloat16

    def make(self) -> list[torch.Tensor | None]:
        """Inputs of the operator, blocks in random order."""
        num_blocks = -(-self.context // BLOCK_SIZE)
        shape = (self.num_seqs * num_blocks, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        tables = torch.randperm(shape[0], device="cuda", dtype=torch.int32).view(self.num_seqs, num_blocks)
        positions = torch.arange(self.context - self.new, self.context, device="cuda")
        slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        num_tokens = self.num_seqs * self.new
        cu_seqlens = torch.arange(self.num_seqs + 1, device="cuda", dtype=torch.int32) * self.new
        scale = None if self.cache_dtype == torch.bfloat16 else torch.ones(1, device="cuda")
        return [
            _normal(num_tokens, HEADS, HEAD_DIM),
            _normal(num_tokens, KV_HEADS, HEAD_DIM),
            _normal(num_tokens, KV_HEADS, HEAD_DIM),
            _normal(*shape).to(self.cache_dtype),
            tables,
            cu_seqlens,
            torch.full((self.num_seqs,), self.context, device="cuda", dtype=torch.int32),
            slots.flatten().to(torch.int32),
            None,
            None,
            scale,
            scale,
        ]

    @property
    def cache_bytes(self) -> int:
        """That a decode step has to read."""
        return self.num_seqs * self.context * 2 * KV_HEADS * HEAD_DIM * self.cache_dtype.itemsize

    @property
    def flops(self) -> float:
        """Of both products, counting what the causal mask leaves."""
        seen = self.new * (self.context - self.new) + self.new * (self.new + 1) / 2
        return self.num_seqs * 4 * HEADS * HEAD_DIM * seen


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


ATTENTION_CALLS = tuple(
    ("PagedAttention", attention_call(*heads, BLOCK_SIZE, _dtype_name(cache_dtype)))
    for *heads, cache_dtype in (
        *((HEADS, KV_HEADS, HEAD_DIM, cache_dtype) for cache_dtype in CACHE_DTYPES),
        (9, 3, 64, torch.bfloat16),  # SmolLM2-135M, for the whole models
    )
)


def bench_attention(settings: Settings) -> Outcome:
    """Decode and prefill."""
    operator = OPERATORS["PagedAttention"]
    if operator.kernels is None:
        return Outcome(["PagedAttention has no kernels"])
    node = KernelCalls(operator.spec, operator.kernels, ATTRIBUTES, Launcher(Bundle.load(settings.bundle)))
    rates = measure_rates()
    decodes = [
        _decode_row(Step(num_seqs, 1, context, dtype), node, rates.copy_bytes_per_s)
        for dtype in CACHE_DTYPES
        for num_seqs, context in DECODES
    ]
    prefills = [_prefill_row(Step(1, length, length), node, rates.matmul_flops) for length in PREFILLS]
    return Outcome(
        tables=[
            Table(
                "Decode attention, 32 heads, 8 KV heads of 128, one layer",
                ("cache", "sequences", "context", "µs", "GB/s", "% of copy", "torch SDPA, µs (bfloat16)"),
                decodes,
            ),
            Table(
                "Prefill attention, bfloat16, one causal sequence, one layer",
                ("tokens", "µs", "TFLOP/s", "% of matmul", "torch SDPA, µs"),
                prefills,
            ),
        ]
    )


def _decode_row(step: Step, node: KernelCalls, copy_bytes_per_s: float) -> tuple[Cell, ...]:
    seconds = time_step(step, node)
    rate = step.cache_bytes / seconds
    torch_us = 1e6 * _time_torch(step) if step.cache_dtype == torch.bfloat16 else None
    share = 100 * rate / copy_bytes_per_s
    return (
        _dtype_name(step.cache_dtype),
        step.num_seqs,
        step.context,
        1e6 * seconds,
        rate / 1e9,
        share,
        torch_us,
    )


def _prefill_row(step: Step, node: KernelCalls, matmul_flops: float) -> tuple[Cell, ...]:
    seconds = time_step(step, node)
    rate = step.flops / seconds
    return step.new, 1e6 * seconds, rate / 1e12, 100 * rate / matmul_flops, 1e6 * _time_torch(step)


def time_step(step: Step, node: KernelCalls) -> float:
    """Seconds of one call."""

    def call_of(inputs: list[torch.Tensor | None]) -> Callable[[], object]:
        return lambda: node(*inputs)

    return time_each([call_of(step.make()) for _ in range(num_copies(step.cache_bytes, limit=16))])


def _time_torch(step: Step) -> float:
    def make() -> Callable[[], object]:
        q = _normal(step.num_seqs, HEADS, step.new, HEAD_DIM)
        k, v = (_normal(step.num_seqs, KV_HEADS, step.context, HEAD_DIM) for _ in range(2))
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=step.new > 1, enable_gqa=True
        )

    return time_each([make() for _ in range(num_copies(step.cache_bytes, limit=16))])


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    run_part(__doc__, bench_attention)

"""How much memory the paged cache gets on the machine that serves."""

from __future__ import annotations

from dataclasses import dataclass

from trtforge.engine_options import EngineOptions
from trtforge.errors import ConfigError
from trtforge.manifest import MAX_SLOTS, KVCacheLayout, Manifest


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Sizes in bytes, but for the numbers of blocks."""

    weights_bytes: int
    block_bytes: int
    block_size: int  # tokens
    num_blocks: int
    num_host_blocks: int
    available_bytes: int  # when this was planned: before weights were loaded, or after an engine was
    step_bytes: int = 0  # what an engine's steps compute in, beside the cache; allocated before

    def __str__(self) -> str:
        rows = (
            ("free memory", self.available_bytes, ""),
            ("weights", self.weights_bytes, ""),
            *([("steps", self.step_bytes, "activations, inputs and logits")] if self.step_bytes else []),
            (
                "KV cache",
                self.num_blocks * self.block_bytes,
                f"{self.num_blocks:,} blocks of {self.block_size} tokens",
            ),
            ("swap space", self.num_host_blocks * self.block_bytes, f"{self.num_host_blocks:,} blocks"),
        )
        return "memory budget:" + "".join(
            f"\n  {name:<12}{size / 2**20:>12,.1f} MiB  {remark}".rstrip() for name, size, remark in rows
        )


def plan_memory(
    manifest: Manifest, options: EngineOptions, available_bytes: int, *, step_bytes: int = 0
) -> MemoryBudget:
    """Blocks as the build planned them, or as many as the options allow if they say something.

    Raises ConfigError if that is none, or more than slot numbers reach.
    """
    layout = manifest.kv_cache
    block_bytes = layout.bytes_per_token * layout.block_size
    limits = []
    if options.kv_cache_bytes:
        limits.append(options.kv_cache_bytes)
    if options.kv_cache_fraction:
        limits.append(int(options.kv_cache_fraction * available_bytes))
    num_blocks = min(limits) // block_bytes if limits else layout.num_blocks
    if not 0 < num_blocks * layout.block_size <= MAX_SLOTS:
        raise ConfigError(
            f"kv_cache_bytes {options.kv_cache_bytes} and kv_cache_fraction {options.kv_cache_fraction} of "
            f"{available_bytes} bytes make {num_blocks} blocks of {block_bytes} bytes: allowed are 1 to "
            f"{MAX_SLOTS // layout.block_size}"
        )
    num_host_blocks = options.swap_bytes // block_bytes
    if options.preemption_mode == "swap" and not num_host_blocks:
        raise ConfigError(
            f"preemption_mode swap needs room: swap_bytes {options.swap_bytes} holds no block of "
            f"{block_bytes} bytes"
        )
    return MemoryBudget(
        weights_bytes=_weights_bytes(manifest),
        block_bytes=block_bytes,
        block_size=layout.block_size,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        available_bytes=available_bytes,
        step_bytes=step_bytes,
    )


def _weights_bytes(manifest: Manifest) -> int:
    """Of the engines, which have weights of their own, or of all files of the ranks."""
    engines = [rank.engine.size_bytes for rank in manifest.ranks if rank.engine is not None]
    if engines:
        return sum(engines)
    return sum(size for name, size in manifest.files.items() if name.startswith("rank"))


def resize(layout: KVCacheLayout, budget: MemoryBudget) -> KVCacheLayout:
    """The layout with the budget's number of blocks."""
    return layout.model_copy(update={"num_blocks": budget.num_blocks})

"""What a build came to: tables for people, build.json in the repository for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.table import Table
from typing_extensions import Self

from trtforge.builder.plan import blocks_per_sequence
from trtforge.builder.quantization.policy import WeightChoice
from trtforge.builder.stages import StageRecord
from trtforge.manifest import DType, Manifest, Runtime, cache_bytes_per_token

REPORT_FILE = "build.json"


class RankReport(BaseModel):
    """What one rank holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: int
    num_layers: int
    num_heads: int  # of queries, in the layer with the most of them
    num_kv_heads: int
    weight_bytes: int
    kv_bytes_per_token: int
    engine_bytes: int | None = None


class BuildReport(BaseModel):
    """The figures of one build. Sequence lengths and block sizes are in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str  # MODEL as it was given
    architecture: str
    runtime: Runtime
    dtype: DType
    build_key: str
    num_parameters: int
    num_nodes: int
    weight_bytes: int
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    max_model_len: int
    num_full_sequences: int  # sequences of max_model_len that the cache holds at once
    engine_bytes: int | None = None  # of all ranks; None: the runtime has no engines
    weights: tuple[WeightChoice, ...] = ()  # of two dims or more
    ranks: tuple[RankReport, ...]
    stages: tuple[StageRecord, ...]

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        *,
        source: str,
        num_nodes: int,
        num_heads: Sequence[int],
        weight_bytes: Sequence[int],
        weights: Sequence[Sequence[WeightChoice]],
        stages: Sequence[StageRecord],
    ) -> Self:
        """The report on the build that `manifest` describes; heads, bytes and weights are by rank."""
        cache, max_model_len = manifest.kv_cache, manifest.limits.max_model_len
        engines = [rank.engine.size_bytes for rank in manifest.ranks if rank.engine is not None]
        return cls(
            source=source,
            architecture=manifest.model.architecture,
            runtime=manifest.runtime,
            dtype=manifest.dtype,
            build_key=manifest.build_key,
            num_parameters=manifest.model.num_parameters,
            num_nodes=num_nodes,
            weight_bytes=sum(weight_bytes),
            kv_bytes_per_token=cache.bytes_per_token,
            block_size=cache.block_size,
            num_blocks=cache.num_blocks,
            kv_cache_bytes=cache.num_blocks * cache.block_size * cache.bytes_per_token,
            max_model_len=max_model_len,
            num_full_sequences=cache.num_blocks // blocks_per_sequence(max_model_len, cache.block_size),
            engine_bytes=sum(engines) if engines else None,
            weights=_sum_up(weights),
            ranks=tuple(
                _rank_report(manifest, number, heads, nbytes)
                for number, (heads, nbytes) in enumerate(zip(num_heads, weight_bytes, strict=True))
            ),
            stages=tuple(stages),
        )

    def save(self, folder: Path) -> None:
        """Write `folder`/build.json."""
        (folder / REPORT_FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/build.json as this version wrote it."""
        return cls.model_validate_json((folder / REPORT_FILE).read_text())

    def tables(self) -> Group:
        """The figures, what ranks hold if there are several, what became of weights if any are quantized, and
        the stages, for a terminal."""
        ranks = [self._ranks()] if len(self.ranks) > 1 else []
        weights = [self._weights()] if any(choice.is_quantized for choice in self.weights) else []
        return Group(self._figures(), *ranks, *weights, self._stages())

    def _figures(self) -> Table:
        table = Table(title=f"{self.architecture} for {self.runtime} in {self.dtype}", title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        table.add_row("parameters", f"{self.num_parameters:,}")
        table.add_row("graph nodes", f"{self.num_nodes:,}")
        table.add_row("weights", format_bytes(self.weight_bytes))
        if self.engine_bytes is not None:
            table.add_row("engine", format_bytes(self.engine_bytes))
        table.add_row("KV cache per token", format_bytes(self.kv_bytes_per_token))
        table.add_row("KV cache", format_bytes(self.kv_cache_bytes))
        table.add_row(f"KV blocks of {self.block_size} tokens", f"{self.num_blocks:,}")
        table.add_row(f"sequences of {self.max_model_len:,} tokens that fit", f"{self.num_full_sequences:,}")
        return table

    def _ranks(self) -> Table:
        table = Table()
        has_engines = any(rank.engine_bytes is not None for rank in self.ranks)
        names = ["rank", "stage", "layers", "heads", "KV heads", "weights", "KV cache per token"]
        for name in [*names, *(["engine"] if has_engines else [])]:
            table.add_column(name, justify="right")
        for number, rank in enumerate(self.ranks):
            counts = (number, rank.stage, rank.num_layers, rank.num_heads, rank.num_kv_heads)
            sizes = [format_bytes(rank.weight_bytes), format_bytes(rank.kv_bytes_per_token)]
            if rank.engine_bytes is not None:
                sizes.append(format_bytes(rank.engine_bytes))
            table.add_row(*map(str, counts), *sizes)
        return table

    def _weights(self) -> Table:
        table = Table()
        table.add_column("weights")
        for column in ("count", "before", "after"):
            table.add_column(column, justify="right")
        table.add_column("why")
        rows: dict[tuple[str, str], list[WeightChoice]] = {}
        for choice in self.weights:
            rows.setdefault((choice.label, choice.reason), []).append(choice)
        for (label, reason), choices in rows.items():
            before = format_bytes(sum(choice.bytes_before for choice in choices))
            after = format_bytes(sum(choice.bytes_after for choice in choices))
            table.add_row(label, f"{len(choices):,}", before, after, reason)
        return table

    def _stages(self) -> Table:
        table = Table()
        table.add_column("stage")
        table.add_column("time, s", justify="right")
        cumulative = any(record.peak_is_cumulative for record in self.stages)
        table.add_column("peak memory so far" if cumulative else "peak memory", justify="right")
        for record in self.stages:
            table.add_row(record.name, f"{record.seconds:.1f}", format_bytes(record.peak_memory_bytes))
        table.add_row("all", f"{sum(record.seconds for record in self.stages):.1f}", "")
        return table


def _rank_report(manifest: Manifest, number: int, num_heads: int, weight_bytes: int) -> RankReport:
    rank = manifest.ranks[number]
    return RankReport(
        stage=number // manifest.tp_size,
        num_layers=len(rank.kv_layers),
        num_heads=num_heads,
        num_kv_heads=max(layer.num_kv_heads for layer in rank.kv_layers),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=cache_bytes_per_token(rank.kv_layers, manifest.kv_cache.dtype),
        engine_bytes=None if rank.engine is None else rank.engine.size_bytes,
    )


def _sum_up(ranks: Sequence[Sequence[WeightChoice]]) -> tuple[WeightChoice, ...]:
    """Each weight once, with the bytes that all ranks have of it and the first one's shape."""
    choices: dict[str, WeightChoice] = {}
    for choice in (choice for rank in ranks for choice in rank):
        before = choices.get(choice.name)
        if before is not None:
            choice = replace(
                before,
                bytes_before=before.bytes_before + choice.bytes_before,
                bytes_after=before.bytes_after + choice.bytes_after,
            )
        choices[choice.name] = choice
    return tuple(choices.values())


def format_bytes(count: int) -> str:
    """In the largest unit of which there is at least one."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"

"""A plan as tables and sentences for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from trtforge.builder.planning.report import Decode, PlanReport
from trtforge.builder.report import format_bytes


def plan_tables(report: PlanReport) -> Group:
    """The figures of a plan, for a terminal."""
    parts: list[RenderableType] = [_memory(report), _verdict(report), _sequence_table(report)]
    if report.decode:
        parts += [_bound_text(report), _prefill_table(report), _decode_table(report)]
    else:
        parts.append(f"No times: {report.gpu_source}.")
    parts += [f"Note: {remark}." for remark in report.remarks]
    return Group(*parts)


def _memory(report: PlanReport) -> Table:
    ranks = f"{report.tp * report.pp} x {report.gpu}" if report.tp * report.pp > 1 else report.gpu
    table = Table(title=f"{report.architecture} on {ranks}: one rank", title_justify="left")
    table.add_column(f"{report.num_parameters:,} parameters")
    for number, stage in enumerate(report.stages):
        name = "bytes" if report.pp == 1 else f"stage {number}, {stage.num_layers} layers"
        table.add_column(name, justify="right")
    budget_bytes = int(report.gpu_memory_bytes * report.memory_fraction)
    fraction = f"{report.memory_fraction:g} of {format_bytes(report.gpu_memory_bytes)}"
    rows = [
        (fraction, [budget_bytes] * len(report.stages)),
        (f"weights in {report.weights}", [stage.quantized_bytes for stage in report.stages]),
        ("their scales", [stage.scales_bytes for stage in report.stages]),
        (f"embeddings in {report.dtype}", [stage.embeddings_bytes for stage in report.stages]),
        (f"other weights in {report.dtype}", [stage.other_weights_bytes for stage in report.stages]),
        (
            f"activations of {report.max_num_batched_tokens:,} tokens",
            [stage.activations_bytes for stage in report.stages],
        ),
        ("left for the KV cache", [stage.kv_cache_bytes for stage in report.stages]),
        (
            f"of which a token takes, in {report.kv_cache}",
            [stage.kv_bytes_per_token for stage in report.stages],
        ),
    ]
    for name, sizes in rows:
        if any(sizes):
            table.add_row(name, *(format_bytes(size) for size in sizes))
    return table


def _verdict(report: PlanReport) -> str:
    longest = f"one sequence of {report.max_model_len:,} tokens"
    if report.fits:
        return f"Fits, with room for {longest} and more."
    if not report.remedies:
        return f"Does not fit with {longest}, nor with fewer bits or more ranks of one machine."
    return f"Does not fit with {longest}. Each of these makes it fit: {'; '.join(report.remedies)}."


def _sequence_table(report: PlanReport) -> Table:
    table = Table()
    table.add_column("tokens of a sequence", justify="right")
    table.add_column("KV cache, one rank", justify="right")
    table.add_column("sequences it holds", justify="right")
    for row in report.sequences:
        table.add_row(f"{row.num_tokens:,}", format_bytes(row.bytes_per_sequence), f"{row.num_sequences:,}")
    return table


def _bound_text(report: PlanReport) -> str:
    if report.efficiency == 1:
        text = (
            "Roofline, an upper bound: kernels that run one after the other cannot be faster, and are slower."
        )
    else:
        text = f"Roofline at an efficiency of {report.efficiency:g}, which is an assumption."
    if report.ridge_batch is not None:
        text += f" From a batch of {report.ridge_batch:,} on, matmuls are bound by compute."
    return f"{text} Rates: {report.gpu_source}."


def _prefill_table(report: PlanReport) -> Table:
    table = Table()
    table.add_column("prompt, tokens", justify="right")
    table.add_column("prefill, ms", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("bound by")
    for row in report.prefill:
        table.add_row(f"{row.prompt_len:,}", _number(row.time_ms), f"{row.tokens_per_s:,.0f}", row.bound)
    return table


def _decode_table(report: PlanReport) -> Table:
    table = Table(
        title="decode: ms a step, tokens/s, bound by (m)emory, (c)ompute or (l)ink", title_justify="left"
    )
    table.add_column("batch", justify="right")
    contexts = sorted({point.context_len for point in report.decode})
    for context in contexts:
        table.add_column(f"{context:,} tokens each", justify="right")
    for batch in sorted({point.batch for point in report.decode}):
        table.add_row(f"{batch:,}", *(_cell(point) for point in report.decode if point.batch == batch))
    return table


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _cell(point: Decode) -> str:
    if not point.fits:
        return "no room"
    return f"{_number(point.step_ms)}  {point.tokens_per_s:,.0f}/s {point.bound[0]}"

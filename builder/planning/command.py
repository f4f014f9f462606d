"""The command `trtforge plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trtforge.builder.planning.options import DTypeChoice, KVCacheChoice, PlanOptions
from trtforge.builder.quantization.weights import ActivationScheme
from trtforge.errors import ConfigError


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face model: a local folder, for which config.json is enough, or a hub id.",
        ),
    ],
    gpu: Annotated[str, typer.Option(help="The GPU of every rank, such as h200; a wrong name lists all.")],
    tp: Annotated[int, typer.Option(help="Ranks that share every layer.")] = 1,
    pp: Annotated[int, typer.Option(help="Stages with some layers each.")] = 1,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 weights, 16-bit matmuls.")] = False,
    int4: Annotated[bool, typer.Option("--int4", help="INT4 weights, 16-bit matmuls.")] = False,
    activations: Annotated[
        ActivationScheme | None,
        typer.Option(help="With --fp8: FP8 matmuls, as build-engine makes them.", show_default=False),
    ] = None,
    dtype: Annotated[
        DTypeChoice, typer.Option(help="Of all that is not quantized; auto is the model's, or bfloat16.")
    ] = "auto",
    kv_cache_dtype: Annotated[KVCacheChoice, typer.Option(help="auto is that of --dtype.")] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the longest sequence, prompt and answer; the model's own limit, at most 8192, "
            "by default.",
            show_default=False,
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences in flight at once.")] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens of one step, prefill and decode together.")
    ] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens of one KV cache block.")] = 32,
    memory_fraction: Annotated[
        float, typer.Option(help="Of the GPU's memory that weights, activations and KV cache may use.")
    ] = 0.9,
    efficiency: Annotated[
        float, typer.Option(help="Of the GPU's rates that you expect to reach; 1 is the roofline.")
    ] = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all figures as JSON.")
    ] = None,
    svg_file: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Also draw throughput and latency by batch.")
    ] = None,
) -> None:
    """Say what a deployment needs and how fast it can be, before anything is built.

    Only the model's config is read: no weights are downloaded and no GPU is needed.

    Times are a roofline, an upper bound of speed: docs/planning.md has the formulas.

    \b
    Examples:
      trtforge plan ./Llama-3.1-8B --gpu h200
      trtforge plan ./Llama-3.1-70B --gpu h100 --tp 4 --fp8 --activations dynamic
      trtforge plan Qwen/Qwen3-30B-A3B --gpu l40s --int4 --json plan.json --svg plan.svg

    \b
    Exit codes:
      0  planned, whether it fits or not
      2  an option, a file or the GPU's name cannot work
      3  the model cannot be exported, hence not planned
    """
    options = PlanOptions(
        model=model,
        gpu=gpu,
        tp=tp,
        pp=pp,
        fp8=fp8,
        int4=int4,
        activations=activations,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        memory_fraction=memory_fraction,
        efficiency=efficiency,
    )
    with Console(stderr=True).status("loading transformers"):
        # Only now: it takes seconds to import, and a wrong option is known without it.
        from trtforge.builder.planning.charts import write_charts
        from trtforge.builder.planning.plan_model import plan_model
        from trtforge.builder.planning.tables import plan_tables
    report = plan_model(options)
    Console().print(plan_tables(report), highlight=False)
    try:
        if json_file is not None:
            report.save(json_file)
        if svg_file is not None:
            write_charts(report, svg_file)
    except OSError as error:
        raise ConfigError(f"the plan cannot be written: {error}") from None

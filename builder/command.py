"""The command `build-engine`, which is `trtforge build` too."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trtforge.builder.options import (
    BuildOptions,
    CalibrationChoice,
    DTypeChoice,
    KVCacheChoice,
    RuntimeChoice,
    parse_bytes,
    parse_cache_folder,
)
from trtforge.builder.quantization.weights import ActivationScheme


def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Hugging Face model: a local folder or a hub id. Or a GGUF file."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Triton model repository to build into.")],
    name: Annotated[
        str, typer.Option(help="Name of the model, and of its folder, in the repository.")
    ] = "llm",
    runtime: Annotated[
        RuntimeChoice,
        typer.Option(help="What executes the model; auto picks openvino today, reference is torch."),
    ] = "auto",
    dtype: Annotated[
        DTypeChoice, typer.Option(help="Of weights and KV cache; auto keeps the model's, if the runtime can.")
    ] = "auto",
    tp: Annotated[int, typer.Option(help="Ranks that share every layer: tensor parallelism.")] = 1,
    pp: Annotated[int, typer.Option(help="Stages with some layers each: pipeline parallelism.")] = 1,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Round weights to 8-bit floats (e4m3), a scale a row.")
    ] = False,
    int4: Annotated[
        bool, typer.Option("--int4", help="Round weights to four bits, a scale for a group of columns.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Round weights to 8-bit integers, a scale a row.")
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="With --int4: columns of a group at most, 128, 64 or 32; the largest that divides a weight "
            "by default.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Weights that are not quantized, by a pattern of their names such as '*.down_proj.weight'; "
            "may be repeated.",
            show_default=False,
        ),
    ] = None,
    activations: Annotated[
        ActivationScheme | None,
        typer.Option(
            help="With --fp8 and --int8: round activations too, dynamic with a scale a token, static with "
            "scales that nvidia-modelopt finds by texts. A quantized checkpoint brings its own.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        CalibrationChoice | None,
        typer.Option(
            help="With --int4: scale inputs by what the model reads, so that rounding costs less; needs "
            "nvidia-modelopt, the whole model in memory, and time.",
            show_default=False,
        ),
    ] = None,
    calibration_text: Annotated[
        Path | None,
        typer.Option(
            help="What calibration reads: a file of texts, one a line; docstrings of Python by default.",
            show_default=False,
        ),
    ] = None,
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
    block_size: Annotated[
        int | None,
        typer.Option(help="Tokens of one KV cache block; openvino has 32 only.", show_default=False),
    ] = None,
    kv_cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of the KV cache, such as 512MiB or 2GiB; 1GiB, or what one longest sequence needs "
            "if that is more, by default.",
            show_default=False,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        KVCacheChoice,
        typer.Option(
            help="Of keys and values in the cache; auto is that of --dtype, fp8 (e4m3) for reference and "
            "tensorrt, int8 for openvino."
        ),
    ] = "auto",
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="sm_NN",
            help="GPUs that a TensorRT engine is for, such as sm_89; may be repeated. All that the runtime "
            "can build for by default; full tensorrt builds for this machine's.",
            show_default=False,
        ),
    ] = None,
    engine_cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where TensorRT engines are kept for later builds, or none; a folder in the user's cache by "
            "default.",
            show_default=False,
        ),
    ] = None,
    workspace_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Scratch memory of a TensorRT engine at most.", show_default=False),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="A TensorRT engine whose weights may stay on the host.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another build that has the same name.")
    ] = False,
) -> None:
    """Build a Hugging Face model into a Triton model repository.

    Weights that the checkpoint has quantized keep their numbers; --int4, --fp8 and --int8 are for others.

    OUTPUT/NAME appears whole or not at all. If exactly this build is there already, nothing is done.

    \b
    Examples:
      build-engine ./SmolLM2-135M-Instruct --output repository
      build-engine Qwen/Qwen3-0.6B -o repository --max-model-len 4096
      build-engine ./model -o repository --kv-cache-bytes 2GiB --force
      build-engine ./model -o repository --runtime tensorrt-rtx --gpu sm_89
      build-engine ./model -o repository --runtime tensorrt
      build-engine ./model -o repository --tp 2 --pp 2
      build-engine ./model -o repository --int4 --exclude '*.layers.0.*'
      build-engine ./model -o repository --runtime tensorrt-rtx --fp8 --activations static
      build-engine ./model.Q4_K_M.gguf -o repository

    \b
    Exit codes:
      0  built, or there already
      2  an option, a file or the place for the output cannot work
      3  the model cannot be exported
      4  the build failed
      6  no room on the disk, or the same build is running: try again later
    """
    options = BuildOptions(
        model=model,
        output=output,
        name=name,
        runtime=runtime,
        dtype=dtype,
        tp=tp,
        pp=pp,
        fp8=fp8,
        int4=int4,
        int8=int8,
        group_size=group_size,
        exclude=tuple(exclude or ()),
        activations=activations,
        calibrate=calibrate,
        calibration_text=calibration_text,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_cache_bytes=_bytes(kv_cache_bytes, "--kv-cache-bytes"),
        kv_cache_dtype=kv_cache_dtype,
        gpus=tuple(gpu or ()),
        engine_cache=parse_cache_folder(engine_cache),
        workspace_bytes=_bytes(workspace_bytes, "--workspace-bytes"),
        weight_streaming=weight_streaming,
        force=force,
    )
    _quiet_tools()
    progress = Console(stderr=True)
    if not progress.is_terminal:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("trtforge").setLevel(logging.INFO)
    with progress.status("loading transformers"):
        # Only now: it takes seconds to import, and a wrong option is known without it.
        from trtforge.builder import build as pipeline
    result = pipeline.build(options, progress)
    if result.cached:
        print(f"{result.folder} is this build already (cache hit): nothing to do")
        return
    Console().print(result.report.tables())
    print(f"built {result.folder}")


def _bytes(text: str | None, option: str) -> int | None:
    return None if text is None else parse_bytes(text, option)


def _quiet_tools() -> None:
    """Keep remarks that torch makes about its own parts out of the build's output."""
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")

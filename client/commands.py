"""The commands `serve` and `ask`. What they need is imported when they run, so that `--help` is fast."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from trtforge.errors import ConfigError

if TYPE_CHECKING:
    from trtforge.client.streaming import CompletionStream
    from trtforge.client.triton_server import TritonServer

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "llm"


def serve(
    repository: Annotated[
        Path, typer.Argument(metavar="REPO", help="Model repository, as build-engine made it.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="HTTP port. Any of the ports: 0 takes a free one.")
    ] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="gRPC port, the one for `trtforge ask`.")
    ] = 8001,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the Prometheus metrics.")
    ] = 8002,
    log_file: Annotated[
        Path | None, typer.Option(help="Write the server's log to this file.", show_default=False)
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the server's log on standard error.")
    ] = False,
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds until every model has to have answered.")
    ] = 120.0,
    exit_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests in flight get when the server is stopped.")
    ] = 30.0,
) -> None:
    """Serve a model repository with a real tritonserver until Ctrl-C or SIGTERM.

    Takes the tritonserver on PATH, else the embedded one of the wheel nvidia-pytriton.
    """
    if log_file is not None and verbose:
        raise ConfigError("--log-file and --verbose exclude each other: the server has one log")
    from trtforge.client.triton_server import Ports, TritonServer

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    server = TritonServer(
        repository,
        host=host,
        ports=Ports(http_port, grpc_port, metrics_port),
        log_file=log_file,
        log_to_stderr=verbose,
        start_timeout_s=start_timeout,
        exit_timeout_s=exit_timeout,
    )
    try:
        print(f"Starting tritonserver on {repository} ...", flush=True)
        with server:
            print(_ready_message(server), flush=True)
            server.wait()
    except KeyboardInterrupt:
        print("Stopped.", flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Stopping takes a bounded time and must not be interrupted half-way.
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _ready_message(server: TritonServer) -> str:
    command = 'trtforge ask "What is the capital of France?"'
    if server.ports.grpc != 8001:
        command += f" --url {server.grpc_url}"
    if DEFAULT_MODEL not in server.models:
        command += f" --model {server.models[0]}"
    return (
        f"Ready: {', '.join(server.models)}\n"
        f"  gRPC     {server.grpc_url}\n"
        f"  HTTP     {server.http_url}\n"
        f"  metrics  {server.metrics_url}\n"
        f"Try:       {command}\n"
        "Ctrl-C stops the server."
    )


def ask(
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="What to ask; - reads it from standard input.")
    ],
    url: Annotated[str, typer.Option(help="Host and gRPC port of the server.")] = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="Name of the model on the server.")] = DEFAULT_MODEL,
    system: Annotated[
        str | None, typer.Option(help="System message before the question.", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the answer at most.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token always.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Choose among the likeliest tokens up to this total.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Choose among this many likeliest tokens.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer.", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for the whole answer.", show_default=False)
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print token counts and speed on standard error.")
    ] = False,
) -> None:
    """Ask a served model and print its answer as it comes. Ctrl-C cancels the request on the server."""
    text = _read_question(question)
    if raw and system is not None:
        raise ConfigError("--system needs the chat template, which --raw switches off")
    from trtforge.client.protocol import SamplingOptions
    from trtforge.client.streaming import Client

    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    sampling = SamplingOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    with Client(url, model) as client:
        started = time.monotonic()
        with client.stream(
            text if raw else None,
            messages=None if raw else messages,
            sampling=sampling,
            timeout_s=timeout,
        ) as stream:
            _print_answer(stream, started, stats=stats)


def _read_question(argument: str) -> str:
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n") if argument == "-" else argument
        text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ConfigError(f"the question is not UTF-8: {error.reason}") from error
    if not text.strip():
        raise ConfigError("the question is empty")
    return text


def _print_answer(stream: CompletionStream, started: float, *, stats: bool) -> None:
    first = last = next(stream)
    first_time = last_time = time.monotonic()
    print(first.text, end="", flush=True)
    for last in stream:
        last_time = time.monotonic()
        print(last.text, end="", flush=True)
    print(flush=True)
    if last.finish_reason == "length":
        print("(cut off: the limit of tokens is reached, see --max-tokens)", file=sys.stderr)
    if stats:
        line = (
            f"{last.num_input_tokens} tokens in, {last.num_output_tokens} out; "
            f"first after {(first_time - started) * 1000:.0f} ms"
        )
        following = last.num_output_tokens - first.num_output_tokens
        if following:
            line += f", then {following / (last_time - first_time):.1f} tokens/s"
        print(line, file=sys.stderr)

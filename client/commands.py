"""The commands `serve`, `health` and `ask`. What they need is imported when they run: `--help` is fast."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

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
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often in a row a server that failed is started again.")
    ] = 5,
    executor: Annotated[
        Literal["local", "ray"] | None,
        typer.Option(
            help="Where models on several ranks have them: local, on this machine, or ray, on the Ray "
            "cluster that it has joined. Without it, as config.pbtxt says: local.",
            show_default=False,
        ),
    ] = None,
    hang_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds without answer and progress after which a model is taken for dead; 0: never. "
            "More than its step_timeout_s.",
        ),
    ] = 600.0,
) -> None:
    """Serve a model repository with a real tritonserver until Ctrl-C or SIGTERM.

    Takes the tritonserver on PATH, else the embedded one of the wheel nvidia-pytriton. A server that dies,
    or a model that no longer answers, is started again. The first signal lets requests in flight finish,
    the second ends them.
    """
    if log_file is not None and verbose:
        raise ConfigError("--log-file and --verbose exclude each other: the server has one log")
    from trtforge.client.supervisor import RestartPolicy, Supervisor
    from trtforge.client.triton_server import Ports, TritonServer
    from trtforge.engine_options import EXECUTOR_VARIABLE

    server = TritonServer(
        repository,
        host=host,
        ports=Ports(http_port, grpc_port, metrics_port),
        log_file=log_file,
        log_to_stderr=verbose,
        start_timeout_s=start_timeout,
        exit_timeout_s=exit_timeout,
        environment={EXECUTOR_VARIABLE: executor} if executor else {},
    )
    supervisor = Supervisor(server, RestartPolicy(max_restarts, hang_timeout), _report)
    _stop_on_signals(server)
    try:
        print(f"Starting tritonserver on {repository} ...", flush=True)
        supervisor.run(on_ready=lambda: print(_ready_message(server), flush=True))
    except KeyboardInterrupt:
        server.stop()  # the signal may have come while it was stopped to be started again
        print("Stopped.", flush=True)


def _report(message: str) -> None:
    print(f"trtforge: {message}", file=sys.stderr, flush=True)


def _stop_on_signals(server: TritonServer) -> None:
    """The first signal raises KeyboardInterrupt, which lets requests finish; the next ones end them."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, lambda *_: server.kill())
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


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


def health(
    url: Annotated[str, typer.Option(help="Host and gRPC port of the server.")] = DEFAULT_URL,
    model: Annotated[
        str | None, typer.Option(help="Ask this model; without it, every one.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that each model has to answer.")] = 10.0,
) -> None:
    """Ask every model of a server for one token. The exit code is 0 only if all have answered.

    6 means that a model has no room now: it is full, or its engine is being started again.
    """
    from trtforge.client.health import check_health

    print(f"Healthy: {', '.join(check_health(url, model, timeout))}")


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

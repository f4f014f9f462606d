"""The options of `trtforge bench` as the command line shows them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class LengthMix(str, Enum):
    """Where lengths come from."""

    given = "given"
    sharegpt = "sharegpt"


class PromptForm(str, Enum):
    """How random prompts are sent."""

    ids = "ids"
    text = "text"


Url = Annotated[str, typer.Option(help="Host and gRPC port of the server.")]
Model = Annotated[str, typer.Option(help="Name of the model on the server.")]
MetricsUrl = Annotated[
    str | None,
    typer.Option(help="The server's metrics, read before and after each run.", show_default=False),
]
RequestRate = Annotated[
    float | None,
    typer.Option(
        help="Open loop: requests a second on average, whatever the server does; inf: all at once.",
        show_default=False,
    ),
]
Burstiness = Annotated[
    float,
    typer.Option(
        help="Shape of the gamma distribution of the gaps: 1 is a Poisson process, below 1 is burstier."
    ),
]
Concurrency = Annotated[
    str | None,
    typer.Option(
        help="Closed loop: requests in flight; several, as in 1,2,4,8, are run one after another. "
        "[default: 1 without --request-rate]",
        show_default=False,
    ),
]
NumRequests = Annotated[int, typer.Option(min=1, help="Requests of each run.")]
Warmup = Annotated[int, typer.Option(min=0, help="Requests sent before the first run and not measured.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same requests at the same times.")]
Lengths = Annotated[
    LengthMix,
    typer.Option(
        help="given: --input-len and --output-len; sharegpt: lognormal lengths as of chats, clipped to "
        "--max-model-len."
    ),
]
InputLen = Annotated[str, typer.Option(help="Tokens of a prompt: one number, or a range as in 16:256.")]
OutputLen = Annotated[str, typer.Option(help="Tokens of an answer: one number, or a range.")]
Dataset = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines instead of random prompts: each has prompt, messages or input_ids, and may have "
        "max_tokens.",
        show_default=False,
    ),
]
Prompts = Annotated[PromptForm, typer.Option(help="Random prompts are token ids, or text of common words.")]
VocabSize = Annotated[int, typer.Option(min=1, help="Random token ids are below this; at most the model's.")]
MaxModelLen = Annotated[
    int, typer.Option(min=2, help="Longest sequence that --lengths sharegpt makes, prompt and answer.")
]
SharedPrefix = Annotated[
    int, typer.Option(min=0, help="Tokens in front of every prompt, the same in all of them.")
]
IgnoreEos = Annotated[
    bool, typer.Option(help="Go on after the end of sequence, so that answers are as long as asked for.")
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the server's")]
Timeout = Annotated[
    float | None, typer.Option(min=0.001, help="Seconds a request may take.", show_default=False)
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(
        help="Limits in ms that a request has to meet to count for goodput: ttft:200, tpot:50, e2el:5000; "
        "may be given several times.",
        show_default=False,
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write everything to this file.", show_default=False)
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", help="Write a report with charts to this file.", show_default=False)
]

"""The command `bench`. What it needs is imported when it runs, so that `--help` is fast."""

from __future__ import annotations

import typer

from trtforge.client.bench import options
from trtforge.client.bench.options import LengthMix, PromptForm
from trtforge.client.commands import DEFAULT_MODEL, DEFAULT_URL
from trtforge.errors import ServerError

INTERRUPTED_EXIT_CODE = 130


def bench(
    url: options.Url = DEFAULT_URL,
    model: options.Model = DEFAULT_MODEL,
    request_rate: options.RequestRate = None,
    burstiness: options.Burstiness = 1.0,
    concurrency: options.Concurrency = None,
    num_requests: options.NumRequests = 100,
    warmup: options.Warmup = 2,
    seed: options.Seed = 0,
    lengths: options.Lengths = LengthMix.given,
    input_len: options.InputLen = "128",
    output_len: options.OutputLen = "64",
    dataset: options.Dataset = None,
    prompts: options.Prompts = PromptForm.ids,
    vocab_size: options.VocabSize = 256,
    max_model_len: options.MaxModelLen = 2048,
    shared_prefix_tokens: options.SharedPrefix = 0,
    ignore_eos: options.IgnoreEos = True,
    temperature: options.Temperature = None,
    timeout: options.Timeout = None,
    goodput: options.Goodput = None,
    metrics_url: options.MetricsUrl = None,
    json_file: options.JsonFile = None,
    html_file: options.HtmlFile = None,
) -> None:
    """Measure a served model under load: TTFT, ITL, TPOT, E2EL, throughput and goodput.

    Ctrl-C ends the run and reports what there is.

    \b
    Exit codes:
      0  Every request succeeded.
      2  A wrong option or file.
      7  The warm-up was refused as wrong, such as too long.
      8  No server, or requests failed; of those the report says how many and why.
    130  Interrupted by Ctrl-C; the report holds what was measured until then.
    """
    from rich.console import Console

    from trtforge.client.bench.arrivals import parse_loads
    from trtforge.client.bench.generate import SendOptions
    from trtforge.client.bench.lengths import SHAREGPT_INPUT, SHAREGPT_OUTPUT, parse_length
    from trtforge.client.bench.metrics import Objectives
    from trtforge.client.bench.output import Output
    from trtforge.client.bench.session import Session
    from trtforge.client.bench.workload import Workload

    is_sharegpt = lengths is LengthMix.sharegpt
    session = Session(
        url=url,
        model=model,
        loads=parse_loads(request_rate, burstiness, concurrency),
        workload=Workload(
            num_requests=num_requests,
            seed=seed,
            input_length=SHAREGPT_INPUT if is_sharegpt else parse_length(input_len),
            output_length=SHAREGPT_OUTPUT if is_sharegpt else parse_length(output_len),
            vocab_size=vocab_size,
            shared_prefix_tokens=shared_prefix_tokens,
            max_model_len=max_model_len if is_sharegpt else None,
            prompt_form=prompts.value,
            dataset=dataset,
        ),
        options=SendOptions(ignore_eos, temperature, timeout, seed),
        objectives=Objectives.parse(goodput or []),
        num_warmup=warmup,
        metrics_url=metrics_url,
    )
    output = Output(json_file, html_file)
    report, interrupted = session.measure(Console(stderr=True))
    output.write(report)
    if interrupted:
        raise typer.Exit(INTERRUPTED_EXIT_CODE)
    num_failed = sum(sum(run.metrics.failures.values()) for run in report.runs)
    if num_failed:
        num_sent = sum(run.metrics.num_requests for run in report.runs)
        raise ServerError(f"{num_failed} of {num_sent} requests failed")

"""What scripts/load_test.sh needs beside the tools: their input, and one table out of all their results.

    python scripts/load_tools.py vocab-size REPOSITORY MODEL
    python scripts/load_tools.py input FILE --vocab-size N --input-len N --output-len N --requests N
    python scripts/load_tools.py table FOLDER

FOLDER has a subfolder for each concurrency, with what the tools wrote. Standard library only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NS_PER_MS = 1e6
HEADS = ("tool", "requests/s", "tokens/s", "TTFT mean", "p50", "p99", "ITL mean", "p50", "p99", "E2EL mean")


def vocab_size(repository: Path, model: str) -> int:
    """That of a model in a repository that build-engine made."""
    manifest = json.loads((repository / model / "1" / "manifest.json").read_text())
    return int(manifest["model"]["vocab_size"])


def perf_analyzer_input(
    vocab_size: int, input_len: int, output_len: int, num_requests: int
) -> dict[str, Any]:
    """perf_analyzer's input data: prompts of random token ids, answers of fixed length."""
    rng = random.Random(0)  # noqa: S311
    return {
        "data": [
            {
                "input_ids": {
                    "content": [rng.randrange(vocab_size) for _ in range(input_len)],
                    "shape": [input_len],
                },
                "max_tokens": [output_len],
                "stream": [True],
                "sampling_parameters": ['{"ignore_eos": true}'],
            }
            for _ in range(num_requests)
        ]
    }


# --------------------------------------------------------------------------- results, as rows of HEADS


def perf_analyzer_row(path: Path) -> list[float]:
    """From the times of every response: perf_analyzer's own output knows no tokens.

    Each response is taken for one token.
    """
    (experiment,) = json.loads(path.read_text())["experiments"]
    requests = experiment["requests"]
    responses = [request["response_timestamps"] for request in requests]
    ttfts = [times[0] - request["timestamp"] for request, times in zip(requests, responses, strict=True)]
    gaps = [after - before for times in responses for before, after in itertools.pairwise(times)]
    e2els = [times[-1] - request["timestamp"] for request, times in zip(requests, responses, strict=True)]
    start = min(request["timestamp"] for request in requests)
    duration_s = (max(times[-1] for times in responses) - start) / 1e9
    return [
        len(requests) / duration_s,
        sum(map(len, responses)) / duration_s,
        *_summary(ttfts),
        *_summary(gaps),
        statistics.fmean(e2els) / NS_PER_MS,
    ]


def _summary(values_ns: list[int]) -> tuple[float, float, float]:
    percentiles = statistics.quantiles(values_ns, n=100, method="inclusive")
    mean = statistics.fmean(values_ns)
    return mean / NS_PER_MS, percentiles[49] / NS_PER_MS, percentiles[98] / NS_PER_MS


def perf_row(path: Path) -> list[float]:
    """genai-perf and aiperf write the same names."""
    data = json.loads(path.read_text())
    return [
        data["request_throughput"]["avg"],
        data["output_token_throughput"]["avg"],
        *(data["time_to_first_token"][name] for name in ("avg", "p50", "p99")),
        *(data["inter_token_latency"][name] for name in ("avg", "p50", "p99")),
        data["request_latency"]["avg"],
    ]


def bench_row(path: Path) -> list[float]:
    """trtforge bench."""
    (run,) = json.loads(path.read_text())["runs"]
    metrics = run["metrics"]
    return [
        metrics["requests_per_s"],
        metrics["output_tokens_per_s"],
        *(metrics["ttft_ms"][name] for name in ("mean", "p50", "p99")),
        *(metrics["itl_ms"][name] for name in ("mean", "p50", "p99")),
        metrics["e2el_ms"]["mean"],
    ]


# Which file in a concurrency's folder is whose, and how to read it.
RESULTS: tuple[tuple[str, str, Callable[[Path], list[float]]], ...] = (
    ("trtforge bench", "bench.json", bench_row),
    ("perf_analyzer", "perf_analyzer.json", perf_analyzer_row),
    ("genai-perf tensorrtllm", "genai-perf-tensorrtllm/**/*_genai_perf.json", perf_row),
    ("genai-perf vllm", "genai-perf-vllm/**/*_genai_perf.json", perf_row),
    ("aiperf", "aiperf/profile_export_aiperf.json", perf_row),
)


def table(folder: Path) -> Iterable[str]:
    """A Markdown table for each concurrency; tools without a result are left out."""
    for run in sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name)):
        yield f"\nconcurrency {run.name}; latencies in ms\n"
        yield f"| {HEADS[0]:22} | " + " | ".join(f"{head:>10}" for head in HEADS[1:]) + " |"
        yield "|".join(["", "-" * 24, *["-" * 11 + ":"] * (len(HEADS) - 1), ""])
        for name, pattern, read in RESULTS:
            for path in sorted(run.glob(pattern))[:1]:
                cells = " | ".join(f"{value:10.2f}" for value in read(path))
                yield f"| {name:22} | {cells} |"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("vocab-size")
    command.add_argument("repository", type=Path)
    command.add_argument("model")
    command = commands.add_parser("input")
    command.add_argument("file", type=Path)
    for name in ("vocab-size", "input-len", "output-len", "requests"):
        command.add_argument(f"--{name}", type=int, required=True)
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "vocab-size":
        print(vocab_size(arguments.repository, arguments.model))
    elif arguments.command == "table":
        print("\n".join(table(arguments.folder)))
    else:
        lengths = (arguments.vocab_size, arguments.input_len, arguments.output_len, arguments.requests)
        arguments.file.write_text(json.dumps(perf_analyzer_input(*lengths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

NS_PER_MS = 1e6
HEADS = (
    *("req/s", "tokens/s", "out len"),
    *("TTFT", "p50", "p99", "TPOT", "p50", "p99", "gap p99", "E2EL"),
)


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


# --------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """A tool's figures for one run, latencies in ms; None where it has no such figure."""

    requests_per_s: float
    tokens_per_s: float
    tokens_each: float  # of an answer, as the tool counts them
    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    tpot_mean: float
    tpot_p50: float
    tpot_p99: float
    gap_p99: float | None  # of the gaps between tokens, where tools keep them
    e2el_mean: float


def perf_analyzer_row(path: Path) -> Row:
    """From the times of every response: perf_analyzer's own output knows no tokens.

    Each response is taken for one token.
    """
    (experiment,) = json.loads(path.read_text())["experiments"]
    starts = [request["timestamp"] / NS_PER_MS for request in experiment["requests"]]
    answers = [[ns / NS_PER_MS for ns in r["response_timestamps"]] for r in experiment["requests"]]
    duration_s = (max(times[-1] for times in answers) - min(starts)) / 1000
    num_tokens = sum(map(len, answers))
    gaps = [after - before for times in answers for before, after in itertools.pairwise(times)]
    return Row(
        len(starts) / duration_s,
        num_tokens / duration_s,
        num_tokens / len(answers),
        *_summary([times[0] - start for start, times in zip(starts, answers, strict=True)]),
        *_summary([(times[-1] - times[0]) / (len(times) - 1) for times in answers if len(times) > 1]),
        _summary(gaps)[2],
        statistics.fmean(times[-1] - start for start, times in zip(starts, answers, strict=True)),
    )


def _summary(values: list[float]) -> tuple[float, float, float]:
    percentiles = statistics.quantiles(values, n=100, method="inclusive")
    return statistics.fmean(values), percentiles[49], percentiles[98]


def perf_row(path: Path) -> Row:
    """genai-perf and aiperf write the same names. Their inter-token latency is what others call TPOT."""
    data = json.loads(path.read_text())
    return Row(
        data["request_throughput"]["avg"],
        data["output_token_throughput"]["avg"],
        data["output_sequence_length"]["avg"],
        *(data["time_to_first_token"][name] for name in ("avg", "p50", "p99")),
        *(data["inter_token_latency"][name] for name in ("avg", "p50", "p99")),
        None,
        data["request_latency"]["avg"],
    )


def bench_row(path: Path) -> Row:
    """trtforge bench."""
    (run,) = json.loads(path.read_text())["runs"]
    metrics = run["metrics"]
    return Row(
        metrics["requests_per_s"],
        metrics["output_tokens_per_s"],
        metrics["num_output_tokens"] / metrics["num_succeeded"],
        *(metrics["ttft_ms"][name] for name in ("mean", "p50", "p99")),
        *(metrics["tpot_ms"][name] for name in ("mean", "p50", "p99")),
        metrics["itl_ms"]["p99"],
        metrics["e2el_ms"]["mean"],
    )


# Which file in a concurrency's folder is whose, and how to read it.
RESULTS: tuple[tuple[str, str, Callable[[Path], Row]], ...] = (
    ("trtforge bench", "bench.json", bench_row),
    ("perf_analyzer", "perf_analyzer.json", perf_analyzer_row),
    ("genai-perf tensorrtllm", "genai-perf-tensorrtllm/**/*_genai_perf.json", perf_row),
    ("genai-perf vllm", "genai-perf-vllm/**/*_genai_perf.json", perf_row),
    ("aiperf", "aiperf/profile_export_aiperf.json", perf_row),
)


def table(folder: Path) -> Iterable[str]:
    """A Markdown table for each concurrency; tools without a result are left out."""
    for run in sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name)):
        yield f"\nconcurrency {run.name}; latencies in ms, means where not said otherwise\n"
        yield f"| {'tool':22} | " + " | ".join(f"{head:>8}" for head in HEADS) + " |"
        yield "|".join(["", "-" * 24, *["-" * 9 + ":"] * len(HEADS), ""])
        for name, pattern, read in RESULTS:
            for path in sorted(run.glob(pattern))[:1]:
                cells = ["–" if value is None else f"{value:.1f}" for value in astuple(read(path))]
                yield f"| {name:22} | " + " | ".join(f"{cell:>8}" for cell in cells) + " |"


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

"""What quantized weights cost in perplexity and gain in size and speed, on the CPU.

The text is the reference of Python's `help()` (the module pydoc_data.topics), which every Python has. It is
cut into windows; each token but the first of a window is predicted from those before it in the window, by
the executor that serves. Each kind of weights is built, and measured in a process of its own.

    python benchmarks/quantization.py MODEL [--tokens 20480] [--kinds bfloat16,int4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import Figure, describe_machine, finish

WINDOW = 1024  # tokens
BLOCK_SIZE = 32
DECODE_FROM, NUM_DECODES = 128, 64  # tokens in the cache before the first timed step, timed steps
KV_CACHE_BYTES = 32 * 2**20  # of one window, so that resident memory is mostly weights
PACKAGES = ("openvino", "torch", "transformers", "trtforge")

# What each kind is built with, beside its name.
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "int8": True},
    "fp8": {"dtype": "bfloat16", "fp8": True},
    "int4": {"dtype": "bfloat16", "int4": True},
    "int4-g32": {"dtype": "bfloat16", "int4": True, "group_size": 32},
    "int4-awq": {"dtype": "bfloat16", "int4": True, "calibrate": "awq"},
}


def make_text() -> str:
    """All topics of Python's reference, in the order of their names."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def build_kind(model: str, kind: str, repository: Path) -> dict[str, Any]:
    """Build `model` into repository/llm; what the build's report says."""
    from trtforge.builder.build import build
    from trtforge.builder.options import BuildOptions

    result = build(
        BuildOptions(
            model=model,
            output=repository,
            max_model_len=WINDOW,
            kv_cache_bytes=KV_CACHE_BYTES,
            force=True,
            **KINDS[kind],
        )
    )
    report = result.report
    return {
        "weight_bytes": report.weight_bytes,
        "build_s": sum(stage.seconds for stage in report.stages),
        "build_peak_bytes": max(stage.peak_memory_bytes for stage in report.stages),
    }


def measure(folder: Path, num_tokens: int, threads: int) -> dict[str, Any]:
    """Perplexity, memory and speed of the built model in `folder`, in this process."""
    from tokenizers import Tokenizer

    from trtforge.engine_options import EngineOptions
    from trtforge.manifest import Manifest
    from trtforge.runtime.executors.create import create_executor

    manifest = Manifest.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer / "tokenizer.json"))
    tokens = np.array(tokenizer.encode(make_text(), add_special_tokens=False).ids[:num_tokens], np.int32)
    if len(tokens) < num_tokens:
        raise SystemExit(f"the text has {len(tokens):,} tokens, fewer than --tokens {num_tokens:,}")
    before_bytes = resident_bytes()
    executor = create_executor(manifest, folder, EngineOptions(threads=threads))
    decode_s = time_decodes(executor, tokens)
    rss_bytes = resident_bytes() - before_bytes
    begin = time.perf_counter()
    loss, count = 0.0, 0
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        logits = executor.execute(inputs_of(window, 0, range(len(window)))).logits[:-1].astype(np.float64)
        largest = logits.max(1)
        log_sum = np.log(np.exp(logits - largest[:, None]).sum(1)) + largest
        loss += float((log_sum - logits[np.arange(len(logits)), window[1:]]).sum())
        count += len(logits)
    return {
        "perplexity": float(np.exp(loss / count)),
        "predicted_tokens": count,
        "scoring_s": time.perf_counter() - begin,
        "decode_tokens_per_s": 1 / float(np.median(decode_s)),
        "decode_best_tokens_per_s": 1 / min(decode_s),
        "rss_bytes": rss_bytes,
    }


def time_decodes(executor: Any, tokens: np.ndarray) -> list[float]:
    """Seconds of single decode steps after a prefill."""
    executor.execute(inputs_of(tokens[:DECODE_FROM], 0, [DECODE_FROM - 1]))
    seconds = []
    for position in range(DECODE_FROM, DECODE_FROM + NUM_DECODES):
        inputs = inputs_of(tokens[position : position + 1], position, [0])
        begin = time.perf_counter()
        executor.execute(inputs)
        seconds.append(time.perf_counter() - begin)
    return seconds


def inputs_of(tokens: np.ndarray, start: int, wanted: Sequence[int]) -> Any:
    """A step with `tokens` of one sequence that has `start` before them, in the first blocks."""
    from trtforge.runtime.executor import ModelInputs

    positions = np.arange(start, start + len(tokens), dtype=np.int32)
    num_blocks = -(-(start + len(tokens)) // BLOCK_SIZE)
    return ModelInputs(
        input_ids=tokens,
        position_ids=positions,
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        cu_seqlens=np.array([0, len(tokens)], np.int32),
        context_lens=np.array([start + len(tokens)], np.int32),
        slot_mapping=positions,
        logits_indices=np.asarray(wanted, np.int32),
    )


def resident_bytes() -> int:
    """Memory of this process, with the file pages that it has mapped and read."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmRSS")


def run_kind(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Build and measure one kind; the second in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        built = build_kind(arguments.model, kind, Path(scratch))
        command = [sys.executable, __file__, arguments.model, "--measure", f"{scratch}/llm/1"]
        command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return built | json.loads(done.stdout.splitlines()[-1])


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """One line a kind."""
    print("| weights | perplexity | weights, MiB | resident, MiB | decode, tok/s, median (best) | build, s |")
    print("|---|--:|--:|--:|--:|--:|")
    for kind, result in results.items():
        print(
            f"| {kind} | {result['perplexity']:.2f} | {result['weight_bytes'] / 2**20:.1f} "
            f"| {result['rss_bytes'] / 2**20:.0f} | {result['decode_tokens_per_s']:.0f} "
            f"({result['decode_best_tokens_per_s']:.0f}) | {result['build_s']:.0f} |",
            flush=True,
        )


def main() -> None:
    """Run the kinds that the command line names, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a local Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=20480, help="of the text that are scored")
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.tokens, arguments.threads)))
        return
    results = {}
    for kind in arguments.kinds.split(","):
        results[kind] = run_kind(arguments, kind)
        print_table({kind: results[kind]})
    print_table(results)
    figures = [
        Figure(f"{kind} {name}", value, unit)
        for kind, result in results.items()
        for name, value, unit in (
            ("perplexity", result["perplexity"], ""),
            ("weights", result["weight_bytes"], "bytes"),
            ("resident memory", result["rss_bytes"], "bytes"),
            ("decode", result["decode_tokens_per_s"], "tokens/s"),
        )
    ]
    finish(figures[0], figures[1:], describe_machine(PACKAGES), arguments.json)


if __name__ == "__main__":
    main()

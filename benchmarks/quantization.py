"""What quantized weights cost in perplexity and gain in size and speed, on the CPU.

The text is the reference of Python's `help()` (the module pydoc_data.topics), which every Python has. It is
scored as `trtforge evaluate` scores it. Each kind of weights is built, and measured in a process of its own.

    python benchmarks/quantization.py MODEL [--gguf FILE] [--tokens 20480] [--kinds bfloat16,int4]

The kind gguf is FILE as it is; for the demo model, the one that it was dequantized from:
`python -m trtforge.builder.demo_model --gguf FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, describe_machine, finish

WINDOW = 1024  # tokens
PACKAGES = ("openvino", "torch", "transformers", "trtforge")

# What each kind is built with, beside its name.
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "int8": True},
    "fp8": {"dtype": "bfloat16", "fp8": True},
    "int4": {"dtype": "bfloat16", "int4": True},
    "int4-g32": {"dtype": "bfloat16", "int4": True, "group_size": 32},
    "int4-awq": {"dtype": "bfloat16", "int4": True, "calibrate": "awq"},
    "gguf": {"dtype": "bfloat16"},
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
            force=True,
            **KINDS[kind],
        )
    )
    report = result.report
    quantized = [choice for choice in report.weights if choice.is_quantized]
    return {
        "weight_bytes": report.weight_bytes,
        "quantized_bytes_before": sum(choice.bytes_before for choice in quantized),
        "quantized_bytes_after": sum(choice.bytes_after for choice in quantized),
        "build_s": sum(stage.seconds for stage in report.stages),
        "build_peak_bytes": max(stage.peak_memory_bytes for stage in report.stages),
    }


def measure(folder: Path, num_tokens: int, threads: int) -> dict[str, Any]:
    """Perplexity, memory and speed of the built model in `folder`, in this process."""
    from trtforge.evaluation.evaluate import evaluate
    from trtforge.evaluation.model import load_model
    from trtforge.evaluation.windows import Text, tokenize
    from trtforge.manifest import Manifest

    text = tokenize(make_text(), folder / Manifest.load(folder).tokenizer)
    if len(text.tokens) < num_tokens:
        raise SystemExit(f"the text has {len(text.tokens):,} tokens, fewer than --tokens {num_tokens:,}")
    text = Text(text.prefix, text.tokens[:num_tokens])
    before_bytes = resident_bytes()
    rss_bytes = 0

    def look_at_memory(done: int, total: int) -> None:
        nonlocal rss_bytes
        rss_bytes = rss_bytes or resident_bytes() - before_bytes  # after the first window

    with load_model(folder, WINDOW, name=str(folder), threads=threads) as model:
        result = evaluate(model, None, text, WINDOW, WINDOW - len(text.prefix), look_at_memory)
    figures = result.model
    return {
        "perplexity": figures.perplexity,
        "predicted_tokens": result.num_scored,
        "prefill_tokens_per_s": figures.prefill_tokens_per_s,
        "decode_tokens_per_s": figures.decode_tokens_per_s,
        "decode_best_tokens_per_s": figures.decode_best_tokens_per_s,
        "rss_bytes": rss_bytes,
    }


def resident_bytes() -> int:
    """Memory of this process, with the file pages that it has mapped and read."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmRSS")


def run_kind(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Build and measure one kind; the second in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        built = build_kind(arguments.gguf if kind == "gguf" else arguments.model, kind, Path(scratch))
        command = [sys.executable, __file__, arguments.model, "--measure", f"{scratch}/llm/1"]
        command += ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return built | json.loads(done.stdout.splitlines()[-1])


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """One line a kind."""
    print(
        "| weights | perplexity | change | weights, MiB | quantized ones, saved | resident, MiB "
        "| prefill, tok/s | decode, tok/s, median (best) | build, s |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    baseline = results.get("bfloat16")
    for kind, result in results.items():
        change = saved = ""
        if baseline is not None and result is not baseline:
            change = f"{100 * (result['perplexity'] / baseline['perplexity'] - 1):+.2f} %"
        if result["quantized_bytes_before"]:
            saved = f"{100 * (1 - result['quantized_bytes_after'] / result['quantized_bytes_before']):.1f} %"
        cells = [
            kind,
            f"{result['perplexity']:.3f}",
            change,
            f"{result['weight_bytes'] / 2**20:.1f}",
            saved,
            f"{result['rss_bytes'] / 2**20:.0f}",
            f"{result['prefill_tokens_per_s']:.0f}",
            f"{result['decode_tokens_per_s']:.0f} ({result['decode_best_tokens_per_s']:.0f})",
            f"{result['build_s']:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run the kinds that the command line names, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a local Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=20480, help="of the text that are scored")
    parser.add_argument("--gguf", metavar="FILE", help="for the kind gguf")
    parser.add_argument("--kinds", help=f"separated by commas, of {', '.join(KINDS)}; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.tokens, arguments.threads)))
        return
    if arguments.kinds is None:
        kinds = [kind for kind in KINDS if kind != "gguf" or arguments.gguf]
    else:
        kinds = arguments.kinds.split(",")
    if "gguf" in kinds and arguments.gguf is None:
        parser.error("the kind gguf needs --gguf FILE")
    results = {}
    for kind in kinds:
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

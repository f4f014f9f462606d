"""What a step costs beside the model: scheduling, inputs, sampling, messages, detokenizing, delivering.

    python benchmarks/host_overhead.py --tokenizer FOLDER [--vllm-python PYTHON] [--json FILE]

1 to 1024 sequences decode one greedy token a step; the executor takes no time and gives the tokens of a
real text. Everything else is what serves, with prefix caching and with the next step scheduled while the
executor has the current one: engine core, messages over their socket, engine client. Parts
above the line belong to the engine process, `decode` and `deliver` (detokenize, up to the callback that
gives a response to Triton) to the process that Triton starts; served, the two run at the same time.

Sampling is measured twice: with an executor that gives each row's likeliest token with the logits, and,
apart, where the sampler has to find it in [sequences, vocabulary] floats, which memory bounds.

A round measures every size once; a part's figure is its median over steps, in the round in which the
medians' sum was the lowest. Garbage is collected as in serving: medians leave collections out, `mean`
and `gc` (the collector's share of the time) do not.

With --vllm-python, that of an environment with vLLM 0.32, vLLM's v1 scheduler takes turns with ours on
the same sequences, and is compared with our `schedule` and `update`, which do the same work.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import Figure, describe_machine, finish
from rich.console import Console
from rich.table import Table
from steady_decode import (
    CORE_PARTS,
    CPU,
    PARTS,
    STUB_PARTS,
    CollectorClock,
    SteadyDecode,
    num_cache_blocks,
    prompt_lengths,
    write_manifest,
)
from vllm_contender import Vllm, running_vllm

from trtforge.errors import TrtforgeError
from trtforge.runtime.sampling.sampler import Sampler
from trtforge.runtime.text.tokenizer import Tokenizer

SIZES = (1, 16, 64, 256, 1024)
VOCAB_SIZES = (32_000, 49_152)
AIM_SIZE = 256
AIM_TOTAL_US = 1500.0
AIM_PER_SEQUENCE_US = 6.0
AIM_FIT = 0.99  # R² of the straight line
WARM_UP_STEPS = 40  # each sequence gets a new block twice
EXTRA_STEPS = 300  # at most, in which the first sequences decode while the last ones are prefilled
ARGMAX_REPEATS = 9
PACKAGES = ("trtforge", "numpy", "msgspec", "tokenizers")


@dataclass(frozen=True, slots=True)
class Measured:
    """One size in one round; times in µs a step."""

    parts: dict[str, float]  # medians
    cpu: float  # median of the processor's time, of which other work on the machine takes none
    mean: float
    p99: float
    gc_share: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    @property
    def core(self) -> float:
        """The engine process."""
        return sum(self.parts[part] for part in CORE_PARTS)

    @property
    def stub(self) -> float:
        """Triton's process."""
        return sum(self.parts[part] for part in STUB_PARTS)


def measure_ours(model_dir: Path, num_sequences: int, num_steps: int) -> Measured:
    """Decode with a new engine, whose sequences are prefilled first."""
    decode = SteadyDecode(model_dir, num_sequences, WARM_UP_STEPS + num_steps + EXTRA_STEPS)
    decode.run_to_steady_state()
    decode.measure(WARM_UP_STEPS)
    collector = CollectorClock()
    gc.collect()
    with collector.running():
        times = decode.measure(num_steps)
    decode.close()
    cpu = statistics.median(times.pop(CPU)) * 1e6
    steps = np.sum(list(times.values()), axis=0) * 1e6
    return Measured(
        parts={part: statistics.median(values) * 1e6 for part, values in times.items()},
        cpu=cpu,
        mean=float(steps.mean()),
        p99=float(np.percentile(steps, 99)),
        gc_share=collector.seconds * 1e6 / float(steps.sum()),
    )


def measure_argmax(vocab_size: int, sizes: list[int]) -> dict[int, float]:
    """µs to sample greedily where the likeliest token has to be found, by number of sequences."""
    logits = np.random.default_rng(0).random((max(sizes), vocab_size), dtype=np.float32)
    sampler = Sampler(vocab_size)
    results = {}
    for size in sizes:
        states, positions = [None] * size, [0] * size
        seconds = []
        for _ in range(ARGMAX_REPEATS):
            start = time.perf_counter()
            sampler.sample(logits[:size], states, positions)
            seconds.append(time.perf_counter() - start)
        results[size] = statistics.median(seconds) * 1e6
    return results


def fit(sizes: list[int], totals: list[float]) -> tuple[float, float]:
    """Slope of the straight line through the totals in µs a sequence, and its R²."""
    slope, start = np.polyfit(sizes, totals, 1)
    residuals = np.asarray(totals) - (start + slope * np.asarray(sizes))
    spread = np.asarray(totals) - np.mean(totals)
    return float(slope), 1 - float(residuals @ residuals) / float(spread @ spread)


def show(best: dict[int, Measured], spreads: dict[int, float], rounds: int) -> None:
    """Print the parts of every size."""
    table = Table(title=f"µs a step beside the executor, greedy, argmax given; best of {rounds} rounds")
    for heading in ("part", *map(str, best)):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in PARTS:
        table.add_row(part, *(f"{m.parts[part]:.0f}" for m in best.values()), end_section=part == "encode")
    table.add_row("engine process", *(f"{m.core:.0f}" for m in best.values()))
    table.add_row("Triton's process", *(f"{m.stub:.0f}" for m in best.values()))
    table.add_row("total", *(f"{m.total:.0f}" for m in best.values()))
    table.add_row("total a sequence", *(f"{m.total / n:.2f}" for n, m in best.items()), end_section=True)
    table.add_row("processor time", *(f"{m.cpu:.0f}" for m in best.values()))
    table.add_row("mean", *(f"{m.mean:.0f}" for m in best.values()))
    table.add_row("99th percentile", *(f"{m.p99:.0f}" for m in best.values()))
    table.add_row("gc", *(f"{m.gc_share:.1%}" for m in best.values()))
    table.add_row("totals of rounds differ by", *(f"{spreads[n]:.0%}" for n in best))
    Console().print(table)


def show_argmax(argmax: dict[int, dict[int, float]], best: dict[int, Measured]) -> None:
    """Print what finding the likeliest token costs."""
    table = Table(title="µs a step to sample where the argmax is not given")
    for heading in ("vocabulary", *map(str, best)):
        table.add_column(heading, justify="right")
    for vocab_size, times in argmax.items():
        table.add_row(str(vocab_size), *(f"{times[size]:.0f}" for size in best))
    Console().print(table)


def ratios(vllm: Vllm, ours: dict[int, list[Measured]]) -> dict[int, float]:
    """vLLM's time over ours for schedule and update: median over rounds of the ratio within a round."""
    return {
        size: statistics.median(
            sum(theirs) / (mine.parts["schedule"] + mine.parts["update"])
            for theirs, mine in zip(vllm.times[size], rounds, strict=True)
        )
        for size, rounds in ours.items()
    }


def show_vllm(vllm: Vllm, best: dict[int, Measured], faster: dict[int, float]) -> None:
    """Print both schedulers."""
    table = Table(title=f"µs a step of scheduler and outputs; vLLM {vllm.version}")
    for heading in ("", *map(str, best)):
        table.add_column(heading, justify="left" if not heading else "right")
    fastest = {size: min(times, key=sum) for size, times in vllm.times.items()}
    table.add_row("trtforge schedule", *(f"{m.parts['schedule']:.0f}" for m in best.values()))
    table.add_row("trtforge update", *(f"{m.parts['update']:.0f}" for m in best.values()))
    table.add_row("vLLM schedule", *(f"{fastest[size][0]:.0f}" for size in best))
    table.add_row("vLLM update_from_output", *(f"{fastest[size][1]:.0f}" for size in best), end_section=True)
    table.add_row("vLLM takes so many times as long", *(f"{faster[size]:.2f}" for size in best))
    Console().print(table)


def figures(best: dict[int, Measured], spreads: dict[int, float]) -> list[Figure]:
    """All figures of ours; the total that has an aim first."""
    sizes = list(best)
    lower = {"unit": "µs", "higher_is_better": False}
    result = []
    for size in sorted(sizes, key=lambda size: size != AIM_SIZE):
        measured, prefix = best[size], f"host_overhead_{size}"
        aim = AIM_TOTAL_US if size == AIM_SIZE else None
        result.append(Figure(f"{prefix}_total", measured.total, aim=aim, **lower))
        result += [Figure(f"{prefix}_{part}", measured.parts[part], **lower) for part in PARTS]
        result.append(Figure(f"{prefix}_engine_process", measured.core, **lower))
        result.append(Figure(f"{prefix}_triton_process", measured.stub, **lower))
        result.append(Figure(f"{prefix}_cpu", measured.cpu, **lower))
        result.append(Figure(f"{prefix}_mean", measured.mean, **lower))
        result.append(Figure(f"{prefix}_p99", measured.p99, **lower))
        result.append(Figure(f"{prefix}_gc_share", measured.gc_share * 100, "%"))
        result.append(Figure(f"{prefix}_spread", spreads[size] * 100, "%"))
    if len(sizes) > 2:
        slope, r_squared = fit(sizes, [best[size].total for size in sizes])
        result.append(Figure("host_overhead_slope", slope, "µs/sequence", AIM_PER_SEQUENCE_US, False))
        result.append(Figure("host_overhead_linear_fit", r_squared, "R²", AIM_FIT))
    return result


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer.json")
    parser.add_argument("--sequences", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=192, help="a size and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vllm-python", help="python of an environment with vLLM 0.32")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def main() -> int:
    """Measure, print."""
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    Tokenizer(arguments.tokenizer)  # refuses a folder that is none
    ours: dict[int, list[Measured]] = {size: [] for size in arguments.sequences}
    with ExitStack() as stack:
        model_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="host-overhead-")))
        shutil.copytree(arguments.tokenizer, model_dir / "tokenizer", ignore=_all_but_tokenizer)
        write_manifest(model_dir, max(VOCAB_SIZES))
        vllm = stack.enter_context(running_vllm(arguments.vllm_python)) if arguments.vllm_python else None
        for round_number in range(arguments.rounds):
            for size, rounds in ours.items():
                rounds.append(measure_ours(model_dir, size, arguments.steps))
                if vllm is not None:
                    num_blocks = num_cache_blocks(size, WARM_UP_STEPS + arguments.steps + EXTRA_STEPS)
                    vllm.measure(prompt_lengths(size), num_blocks, WARM_UP_STEPS, arguments.steps)
            totals = ", ".join(f"{size}: {rounds[-1].total:.0f}" for size, rounds in ours.items())
            print(f"round {round_number}, µs a step: {totals}", file=sys.stderr)
    argmax = {vocab_size: measure_argmax(vocab_size, arguments.sequences) for vocab_size in VOCAB_SIZES}
    best = {size: min(rounds, key=lambda measured: measured.total) for size, rounds in ours.items()}
    spreads = {size: max(m.total for m in rounds) / best[size].total - 1 for size, rounds in ours.items()}
    show(best, spreads, arguments.rounds)
    show_argmax(argmax, best)
    headline, *others = figures(best, spreads)
    others += [
        Figure(f"host_overhead_{size}_sample_argmax_{vocab_size}", time_us, "µs", higher_is_better=False)
        for vocab_size, times in argmax.items()
        for size, time_us in times.items()
    ]
    if vllm is not None:
        faster = ratios(vllm, ours)
        show_vllm(vllm, best, faster)
        others += [Figure(f"host_overhead_{size}_vllm_over_ours", x, "x", 1.0) for size, x in faster.items()]
        machine["vllm"] = vllm.version
    finish(headline, others, machine | {"rounds": arguments.rounds, "steps": arguments.steps}, arguments.json)
    return 0


def _all_but_tokenizer(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("tokenizer")]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrtforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""What paging, prefix caching and inflight batching gain: memory, prefill tokens, tokens a second.

    python benchmarks/kv_memory.py [waste] [prefix] [batching] [--model REPO/llm/1] [--svg FILE] [--json FILE]

`waste`: requests of ShareGPT-like lengths through the engine core on the fake executor; in each step, the
cache slots that sequences hold and the tokens in them. Beside it the same requests in contiguous caches of
the same size that keep, for each sequence, max_model_len, its prompt and the max_tokens that all clients
ask for since they cannot know an answer's length, or, as an oracle, exactly what it will need.
`prefix`: conversations that share a system prompt and send their whole history in every turn, with and
without prefix caching; tokens given to the fake executor, and with --model the time of the real model.
`batching` needs --model, a built model's version folder: the same requests on the same engine, queued at
once (inflight), or in waves of a fixed batch that end with their longest answer, in which finished sequences
cost nothing and only their places stay empty (waves) or go on as rows of one tensor do (padded). The ratio
of steps is what a device gains whose step takes the same time however many sequences decode; a CPU's
arithmetic grows with the batch, and it gains less. Lengths are
log-normal, their standard deviation 1.3 times the mean before long ones are cut.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from batching import ChatDriver, ChatResult, CountingExecutor, Spent, generate_all, generate_in_waves
from common import Figure, describe_machine, finish
from kv_occupancy import Occupancy, contiguous, paged
from rich.console import Console
from rich.table import Table
from traces import SHAREGPT_ANSWER_TOKENS, SHAREGPT_PROMPT_TOKENS, Chats, Mix, Request

from trtforge.chart import Chart, Series, write_svg
from trtforge.engine_options import EngineOptions
from trtforge.errors import TrtforgeError
from trtforge.manifest import Limits, Manifest
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executor import Executor
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.executors.fake_executor import FakeExecutor

PARTS = ("waste", "prefix", "batching")
SEED = 0
VOCAB_SIZE = 32
BLOCK_SIZES = (16, 32)
AIM_WASTED = 4.0  # %, with the smaller blocks
AIM_SPEEDUP = 2.0
NUM_SLOTS = 32 * 1024
MAX_MODEL_LEN = 2048
MAX_TOKENS = 1024
WASTE_LIMITS = Limits(max_model_len=MAX_MODEL_LEN, max_num_seqs=256, max_num_batched_tokens=2048)
CHAT_BLOCKS = 4096
CHATS = Chats(24, 6, system_tokens=512, user_tokens=48, answer_tokens=120, vocab_size=VOCAB_SIZE)
PACKAGES = ("trtforge", "numpy", "openvino")


def measure_waste(num_requests: int) -> list[Occupancy]:
    """Ours first."""
    mix = Mix(num_requests, SHAREGPT_PROMPT_TOKENS, SHAREGPT_ANSWER_TOKENS, MAX_TOKENS, VOCAB_SIZE)
    requests = mix.make(SEED)
    reserves = {
        "contiguous, max_model_len": lambda _: MAX_MODEL_LEN,
        "contiguous, max_tokens": lambda request: len(request.prompt) + MAX_TOKENS,
        "contiguous, oracle": lambda request: len(request.prompt) + request.num_answer_tokens,
    }
    schemes = [paged(requests, NUM_SLOTS, block_size, WASTE_LIMITS) for block_size in BLOCK_SIZES]
    return schemes + [
        contiguous(name, requests, NUM_SLOTS, WASTE_LIMITS, reserve) for name, reserve in reserves.items()
    ]


def waste_figures(schemes: list[Occupancy]) -> list[Figure]:
    """Show the schemes; the aim is on the first one."""
    table = Table(
        title=f"KV cache of {NUM_SLOTS:,} tokens",
        caption="wasted: of allocated slots, those without a token; filled: of all, while requests wait",
    )
    for heading in ("scheme", "wasted", "filled", "run at once", "preempted", "steps"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    figures = []
    for scheme in schemes:
        table.add_row(
            scheme.name,
            f"{scheme.wasted_share:.1%}",
            f"{scheme.filled_share:.1%}",
            f"{scheme.mean_running:.1f}",
            str(scheme.num_preemptions),
            str(len(scheme.filled)),
        )
        name = "kv_" + "_".join(scheme.name.translate(str.maketrans(",", " ")).split())
        aim = AIM_WASTED if scheme is schemes[0] else None
        figures.append(Figure(f"{name}_wasted", scheme.wasted_share * 100, "%", aim, False))
        figures.append(Figure(f"{name}_run_at_once", scheme.mean_running, "sequences"))
    Console().print(table)
    return figures


def occupancy_chart(schemes: list[Occupancy]) -> Chart:
    """Tokens in the cache over time."""
    series = [
        Series(
            scheme.name.removeprefix("contiguous, "),
            range(len(scheme.filled)),
            [100 * filled / scheme.num_slots for filled in scheme.filled],
        )
        for scheme in schemes
    ]
    return Chart("KV cache slots that hold a token", "step", "% of the cache", series)


def measure_chats(
    executor: Executor, limits: Limits, vocab_size: int, chats: Chats
) -> tuple[ChatResult, ChatResult]:
    """Without and with prefix caching; answers have to be the same."""
    results = []
    for prefix_caching in (False, True):
        counting = CountingExecutor(executor)
        options = EngineOptions(prefix_caching=prefix_caching)
        core = EngineCore(counting, limits, (), vocab_size, options=options)
        results.append(ChatDriver(core, counting, chats.make(SEED)).run())
        core.close()
    return results[0], results[1]


def prefix_figures(name: str, without: ChatResult, with_cache: ChatResult) -> list[Figure]:
    """Show what the cache saved."""
    hit_rate = with_cache.num_prefix_hits / max(with_cache.num_prefix_queries, 1)
    reusable = with_cache.num_reusable_tokens / with_cache.num_prompt_tokens
    # Decoding gives the executor every token of an answer but the last.
    decoded = without.num_answer_tokens - len(without.answers)
    prefilled = [result.num_executed_tokens - decoded for result in (without, with_cache)]
    table = Table(title=f"Prefix caching on {len(without.answers)} chat turns, {name}")
    for heading in ("", "off", "on"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("prompt tokens", f"{without.num_prompt_tokens:,}", f"{with_cache.num_prompt_tokens:,}")
    table.add_row("prefilled tokens", *(f"{count:,}" for count in prefilled))
    table.add_row("hit rate", "", f"{hit_rate:.1%}")
    table.add_row("what earlier turns could give", "", f"{reusable:.1%}")
    equal = sum(with_cache.answers[key] == answer for key, answer in without.answers.items())
    table.add_row("same answers", "", f"{equal} of {len(without.answers)}")
    prefix = f"prefix_cache_{name.replace(' ', '_')}"
    figures = [
        Figure(f"{prefix}_hit_rate", hit_rate * 100, "%"),
        Figure(f"{prefix}_reusable", reusable * 100, "%"),
        Figure(f"{prefix}_saved_prefill_tokens", 100 * (1 - prefilled[1] / prefilled[0]), "%"),
    ]
    if name == "model":  # the other's time says nothing
        first_s = [statistics.mean(result.first_token_s) for result in (without, with_cache)]
        table.add_row("seconds", f"{without.seconds:.1f}", f"{with_cache.seconds:.1f}")
        table.add_row("mean time to first token, s", *(f"{value:.2f}" for value in first_s))
        figures.append(Figure(f"{prefix}_time_off_over_on", without.seconds / with_cache.seconds, "x"))
        figures.append(Figure(f"{prefix}_first_token_off_over_on", first_s[0] / first_s[1], "x"))
    Console().print(table)
    return figures


def measure_batching(
    executor: Executor, manifest: Manifest, mix: Mix, batch_size: int, rounds: int
) -> dict[str, list[Spent]]:
    """Three ways of batching in turns, inflight last; the same lengths but new tokens each time."""
    limits = manifest.limits.model_copy(update={"max_num_seqs": batch_size})
    counting = CountingExecutor(executor)
    core = EngineCore(counting, limits, (), manifest.model.vocab_size)
    generate_all(core, counting, mix.make(SEED)[:2])  # warms up
    ways: dict[str, Callable[[list[Request]], Spent]] = {
        "padded": lambda requests: generate_in_waves(core, counting, requests, batch_size, is_padded=True),
        "waves": lambda requests: generate_in_waves(core, counting, requests, batch_size),
        "inflight": lambda requests: generate_all(core, counting, requests),
    }
    runs: dict[str, list[Spent]] = {name: [] for name in ways}
    for round_number in range(rounds):
        for number, (name, run) in enumerate(ways.items()):
            runs[name].append(run(mix.make(SEED, len(ways) * round_number + number + 1)))
            print(f"round {round_number}: {name} {runs[name][-1].seconds:.1f} s", file=sys.stderr)
    core.close()
    return runs


def batching_figures(runs: dict[str, list[Spent]], mix: Mix, batch_size: int) -> list[Figure]:
    """Show all ways, and how much faster than the others the last one is."""
    answers = [request.num_answer_tokens for request in mix.make(SEED)]
    inflight = runs["inflight"]
    table = Table(
        title=f"{len(answers)} requests, {batch_size} at once, median of {len(inflight)} rounds",
        caption=f"answers of {min(answers)} to {max(answers)} tokens, mean {statistics.mean(answers):.0f}, "
        f"standard deviation {statistics.pstdev(answers):.0f}; (inflight is so many times as fast)",
    )
    for heading in ("batching", "tokens/s", "tokens/s of CPU time", "steps"):
        table.add_column(heading, justify="left" if heading == "batching" else "right")
    figures = []
    for name, spent in runs.items():
        cells = []
        for unit in ("seconds", "cpu_seconds", "num_steps"):
            median = statistics.median(getattr(run, unit) for run in spent)
            speedup = statistics.median(
                getattr(run, unit) / getattr(ours, unit) for run, ours in zip(spent, inflight, strict=True)
            )
            cell = str(median) if unit == "num_steps" else f"{sum(answers) / median:.1f}"
            cells.append(cell if name == "inflight" else f"{cell} ({speedup:.2f}x)")
            if name != "inflight":
                aim = AIM_SPEEDUP if (name, unit) == ("padded", "seconds") else None
                figures.append(Figure(f"inflight_over_{name}_{unit}", speedup, "x", aim))
            if unit != "num_steps":
                figures.append(Figure(f"batching_{name}_by_{unit}", sum(answers) / median, "tokens/s"))
        table.add_row(name, *cells)
    Console().print(table)
    return sorted(figures, key=lambda figure: figure.aim is None)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="waste, prefix, batching; default: all")
    parser.add_argument("--requests", type=int, default=600, help="of the memory trace")
    parser.add_argument("--model", type=Path, help="a built model's version folder, such as REPO/llm/1")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batch-requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of static and inflight batching")
    parser.add_argument("--svg", type=Path, help="draw the occupancy of the caches")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"{part} is no part: choose from {', '.join(PARTS)}")
    arguments.parts = arguments.parts or [part for part in PARTS if part != "batching" or arguments.model]
    if "batching" in arguments.parts and arguments.model is None:
        parser.error("batching needs --model")
    return arguments


def main() -> int:
    """Measure, print."""
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    figures: list[Figure] = []
    if "waste" in arguments.parts:
        schemes = measure_waste(arguments.requests)
        figures += waste_figures(schemes)
        if arguments.svg is not None:
            write_svg(arguments.svg, [occupancy_chart(schemes)])
    if "prefix" in arguments.parts:
        limits = Limits(max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=2048)
        fake = FakeExecutor(VOCAB_SIZE, CHAT_BLOCKS, BLOCK_SIZES[0])
        figures += prefix_figures("fake executor", *measure_chats(fake, limits, VOCAB_SIZE, CHATS))
    if arguments.model is not None:
        figures += measure_model(arguments)
    headline, *others = figures
    finish(headline, others, machine, arguments.json)
    return 0


def measure_model(arguments: argparse.Namespace) -> list[Figure]:
    """The parts that run on the real model."""
    manifest = Manifest.load(arguments.model)
    vocab_size = manifest.model.vocab_size
    executor = create_executor(manifest, arguments.model, EngineOptions())
    figures: list[Figure] = []
    if "prefix" in arguments.parts:
        chats = Chats(4, 4, system_tokens=512, user_tokens=48, answer_tokens=32, vocab_size=vocab_size)
        figures += prefix_figures("model", *measure_chats(executor, manifest.limits, vocab_size, chats))
    if "batching" in arguments.parts:
        mix = Mix(arguments.batch_requests, 48, 64, 512, vocab_size)
        runs = measure_batching(executor, manifest, mix, arguments.batch_size, arguments.rounds)
        figures += batching_figures(runs, mix, arguments.batch_size)
    executor.close()
    return figures


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrtforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

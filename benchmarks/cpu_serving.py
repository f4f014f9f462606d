"""Tokens a second on a CPU: trtforge against transformers and openvino-genai, on one machine in one run.

    python benchmarks/cpu_serving.py HF_FOLDER [--genai-python PYTHON --genai-model MODEL] [--json FILE]

Two workloads, greedy and without end of sequence: `single`, one request of 128 tokens in and 128 out; and
`mixed`, 32 requests of 16 to 128 tokens in and out, all there from the beginning. Engines live in processes
of their own and take turns, so that what else the machine does hits all of them alike; ratios are medians
over rounds of the ratio within a round.

openvino-genai is measured if both options are given. PYTHON is that of an environment with
`openvino-genai`; MODEL is the same checkpoint as it reads it, a folder made with
`optimum-cli export openvino --model HF_FOLDER --weight-format fp16 MODEL` or a GGUF file of 16-bit weights.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import Figure, describe_machine, finish
from rich.console import Console
from rich.table import Table

from trtforge.builder.build import build
from trtforge.builder.options import BuildOptions
from trtforge.builder.repository import VERSION_FOLDER
from trtforge.errors import ConfigError, TrtforgeError

CONTENDERS = Path(__file__).with_name("cpu_contenders.py")
AIMS = {"openvino-genai": 1.0, "transformers": 3.0}  # on the mixed workload
MIXED_REQUESTS = 32
MIXED_TOKENS = (16, 128)
MIN_VOCAB_SIZE = 4096  # prompts are random tokens below it
LOAD_LIMIT_S = 120.0
PACKAGES = ("trtforge", "openvino", "transformers", "torch", "numpy")


@dataclass(slots=True)
class Contender:
    """A running engine, and the tokens a second it reached in each round of each workload."""

    name: str
    process: subprocess.Popen[str]
    load_seconds: float = 0.0
    rates: dict[str, list[float]] = field(default_factory=dict)

    def answer(self, limit_s: float) -> dict[str, float]:
        """Its next answer; raises ConfigError if the process ends or is too slow."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise ConfigError(
                    f"{self.name} did not answer within {limit_s:.0f} s: use a machine with less load"
                )
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(f"{self.name} ended with status {self.process.wait()}, see its messages above")
        return json.loads(line)

    def rate(self, workload: dict[str, list], limit_s: float) -> float:
        """Tokens a second of one run."""
        self.process.stdin.write(json.dumps(workload) + "\n")
        self.process.stdin.flush()
        answer = self.answer(limit_s)
        if answer["num_tokens"] != sum(workload["max_tokens"]):
            raise ConfigError(
                f"{self.name} made {answer['num_tokens']} tokens of {sum(workload['max_tokens'])}"
            )
        return answer["num_tokens"] / answer["seconds"]


@contextmanager
def running(name: str, python: str, model: Path, threads: int) -> Iterator[Contender]:
    """Start an engine and wait until it is loaded; the process ends with the context."""
    # Its own libraries, not those of this environment.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    command = [python, str(CONTENDERS), name, str(model), str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd="/"
    )
    try:
        contender = Contender(name, process)
        contender.load_seconds = contender.answer(LOAD_LIMIT_S)["load_seconds"]
        yield contender
    finally:
        process.kill()
        process.wait()


def make_workload(kind: str, round_number: int) -> dict[str, list]:
    """The lengths are the same in every round; the tokens differ, so that no cache of prefixes helps."""
    if kind == "single":
        prompt_lengths, max_tokens = [128], [128]
    else:
        lengths = np.random.default_rng(0).integers(MIXED_TOKENS[0], MIXED_TOKENS[1] + 1, (2, MIXED_REQUESTS))
        prompt_lengths, max_tokens = lengths.tolist()
    tokens = np.random.default_rng(1 + round_number)
    prompts = [tokens.integers(3, MIN_VOCAB_SIZE, length).tolist() for length in prompt_lengths]
    return {"prompts": prompts, "max_tokens": max_tokens}


def run_round(contenders: list[Contender], round_number: int, deadline: float) -> None:
    """Run each workload on each engine; counts only if all of them answer before the deadline."""
    rates: dict[tuple[str, str], float] = {}
    for kind in ("single", "mixed"):
        workload = make_workload(kind, round_number)
        for contender in contenders:
            rate = contender.rate(workload, max(0.0, deadline - time.monotonic()))
            print(f"round {round_number}, {kind}: {contender.name} {rate:.1f} tokens/s", file=sys.stderr)
            rates[kind, contender.name] = rate
    for contender in contenders:
        for kind in ("single", "mixed"):
            contender.rates.setdefault(kind, []).append(rates[kind, contender.name])


def measure(contenders: list[Contender], rounds: int, limit_s: float) -> None:
    """Run as many of the rounds as fit into `limit_s`; raises ConfigError if not even one does."""
    deadline = time.monotonic() + limit_s
    warm_up = {"prompts": make_workload("mixed", rounds)["prompts"][:4], "max_tokens": [4] * 4}
    for contender in contenders:
        contender.rate(warm_up, limit_s)
    for round_number in range(rounds):
        start = time.monotonic()
        run_round(contenders, round_number, deadline)
        now = time.monotonic()
        if now + 1.5 * (now - start) > deadline:
            break


def ratio(ours: Contender, other: Contender, kind: str) -> float:
    """Median over rounds of our rate over theirs."""
    return statistics.median(a / b for a, b in zip(ours.rates[kind], other.rates[kind], strict=True))


def show(contenders: list[Contender]) -> None:
    """Print a table of medians and ratios."""
    rounds = len(contenders[0].rates["mixed"])
    table = Table(title=f"Tokens a second, median of {rounds} rounds (trtforge is so many times as fast)")
    for heading in ("engine", "single", "mixed", "load"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for contender in contenders:
        cells = []
        for kind in ("single", "mixed"):
            cell = f"{statistics.median(contender.rates[kind]):.1f}"
            if contender is not contenders[0]:
                cell += f" ({ratio(contenders[0], contender, kind):.2f}x)"
            cells.append(cell)
        table.add_row(contender.name, *cells, f"{contender.load_seconds:.1f} s")
    Console().print(table)


def figures(contenders: list[Contender]) -> list[Figure]:
    """All figures; ratios first, that to beat most closely at the front."""
    ours, *others = contenders
    ratios = []
    for kind in ("mixed", "single"):
        for other in others:
            aim = AIMS[other.name] if kind == "mixed" else None
            ratios.append(Figure(f"cpu_serving_{kind}_over_{other.name}", ratio(ours, other, kind), "x", aim))
    rates = [
        Figure(f"cpu_serving_{kind}_{contender.name}", statistics.median(contender.rates[kind]), "tokens/s")
        for kind in ("mixed", "single")
        for contender in contenders
    ]
    return ratios + rates


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("--genai-python", help="python of an environment with openvino-genai")
    parser.add_argument("--genai-model", type=Path, help="the same model, converted for openvino-genai")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for the rounds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if (arguments.genai_python is None) != (arguments.genai_model is None):
        parser.error("--genai-python and --genai-model go together")
    return arguments


def main() -> int:
    """Build, measure, print."""
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    model = arguments.model.resolve()
    with ExitStack() as stack:
        repository = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpu-serving-")))
        options = BuildOptions(model=str(model), output=repository, dtype="bfloat16", max_model_len=512)
        built = build(options).folder / VERSION_FOLDER
        entries = [("trtforge", sys.executable, built)]
        if arguments.genai_python is not None:
            entries.append(("openvino-genai", arguments.genai_python, arguments.genai_model.resolve()))
        entries.append(("transformers", sys.executable, model))
        contenders = [stack.enter_context(running(*entry, arguments.threads)) for entry in entries]
        measure(contenders, arguments.rounds, arguments.time_limit)
    show(contenders)
    headline, *others = figures(contenders)
    finish(headline, others, machine | {"threads": arguments.threads}, arguments.json)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrtforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

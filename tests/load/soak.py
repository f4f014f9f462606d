"""Load on a real tritonserver for minutes, with cancellations and killed engines: is every token right?

    python tests/load/soak.py [--requests N] [--concurrency N] [--time-limit S] [--svg FILE] [--json FILE]

The model is the fake executor, whose tokens are a function of the request alone; its cache is small enough
to preempt. Now and then the engine is stopped for a moment, so that requests pile up, and sometimes it is
killed just after. Mixed lengths, greedy and sampled, a third with shared prefixes, over gRPC streams.
Checked: a completed stream has the tokens that the request gives alone; a cancelled or failed one the first
of them; streams fail only when the engine was killed, with an error that says so; memory does not grow
after the warm-up; in the end all blocks are free, all processes gone and no shared memory is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import tokenizers
from rich.console import Console
from rich.table import Table
from soak_load import Expectation, Load, Result, make_plans
from soak_watch import Processes, Trouble, Watch, gauges_when_idle
from tokenizers import decoders, models, pre_tokenizers

from trtforge.builder.repository import VERSION_FOLDER, install_triton_model
from trtforge.chart import Chart, Series, write_svg
from trtforge.client.triton_server import Ports, TritonServer
from trtforge.manifest import KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from common import Figure, describe_machine, finish

VOCAB_SIZE = 256
MAX_MODEL_LEN = 512
NUM_BLOCKS, BLOCK_SIZE = 256, 16  # 64 sequences of about 100 tokens do not fit
LIMITS = Limits(max_model_len=MAX_MODEL_LEN, max_num_seqs=64, max_num_batched_tokens=1024)
RESTART_WINDOW_S = 15.0  # after a kill, in which requests may fail
KILLED_ERROR = "the engine process died (signal SIGKILL)"
MAX_GROWTH_MIB = 32.0
MAX_PROBLEMS_SHOWN = 10
PACKAGES = ("trtforge", "tritonclient", "nvidia-pytriton", "numpy")


def make_repository(folder: Path) -> None:
    """The fake executor as "llm", with a tokenizer that has one token a byte."""
    manifest = Manifest(
        trtforge_version="0",
        build_key="fake",
        runtime="fake",
        dtype="float32",
        model=ModelInfo(
            name="llm", architecture="Fake", vocab_size=VOCAB_SIZE, num_parameters=1, eos_token_ids=()
        ),
        kv_cache=KVCacheLayout(
            dtype="float32",
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            layers=(LayerCache(num_kv_heads=1, head_dim=1),),
        ),
        limits=LIMITS,
        ranks=(),
        files={},
    )
    install_triton_model(folder / "llm", manifest)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer_folder = folder / "llm" / VERSION_FOLDER / manifest.tokenizer
    tokenizer_folder.mkdir()
    tokenizer.save(str(tokenizer_folder / "tokenizer.json"))


class Soak:
    """One run, and everything that was wrong in it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.problems: list[str] = []
        self.seconds = 0.0
        self.verify_seconds = 0.0
        self.final_gauges: dict[str, float] = {}

    def run(self, folder: Path) -> None:
        """Serve, load, stop, check."""
        repository = folder / "repository"
        repository.mkdir()
        make_repository(repository)
        server = TritonServer(repository, ports=Ports(0, 0, 0), log_file=folder / "server.log")
        with server:
            processes = Processes(server)
            self.watch = Watch(server, processes)
            self.watch.start()
            start_s = time.monotonic()
            self.load = asyncio.run(self._load(server, processes))
            self.seconds = time.monotonic() - start_s
            self.final_gauges = gauges_when_idle(server)
            self.watch.stop()
        self._check_idle(processes)
        start_s = time.monotonic()
        self._check_results()
        self.verify_seconds = time.monotonic() - start_s
        self._check_memory()

    async def _load(self, server: TritonServer, processes: Processes) -> Load:
        arguments = self._arguments
        plans = make_plans(arguments.requests, VOCAB_SIZE, MAX_MODEL_LEN, arguments.seed)
        deadline_s = time.monotonic() + arguments.time_limit
        load = Load(server.grpc_url, plans, arguments.concurrency, deadline_s)
        self.trouble = Trouble(processes, arguments.stall_interval, arguments.kill_interval)
        making_trouble = asyncio.create_task(self.trouble.run())
        await load.run()
        making_trouble.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await making_trouble
        return load

    def _check_idle(self, processes: Processes) -> None:
        expected = {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_free_blocks": NUM_BLOCKS}
        for name, value in expected.items():
            if self.final_gauges.get(name) != value:
                self.problems.append(f"idle, {name} is {self.final_gauges.get(name)}, not {value}")
        if not self.watch.max_shm_regions:
            self.problems.append("no shared memory was seen while the server ran: the check is blind")
        if regions := processes.shared_memory():
            self.problems.append(f"shared memory is left behind: {regions}")
        if pids := processes.left_over():
            self.problems.append(f"processes are left behind: {pids}")

    def _check_results(self) -> None:
        expectation = Expectation(VOCAB_SIZE, MAX_MODEL_LEN)
        for index, result in enumerate(self.load.results):
            problem = result.problem or self._problem(result, expectation)
            if problem:
                self.problems.append(f"stream {index}, {result.outcome}: {problem}")
        for at_s in self.load.refused_s:
            if not self._is_after_kill(at_s):
                self.problems.append("a request was refused although the engine had not been killed")

    def _problem(self, result: Result, expectation: Expectation) -> str:
        for index, token_ids in result.token_ids.items():
            wrong = expectation.first_wrong(result.plan, index, token_ids)
            if wrong is not None:
                return f"token {wrong} of {token_ids} in answer {index} is not what the request gives alone"
        if result.outcome == "completed":
            max_tokens = result.plan.sampling.max_tokens
            for index, reason in result.finish_reasons.items():
                num_tokens = len(result.token_ids[index])
                if num_tokens != max_tokens or reason != "length":
                    return f"answer {index} ended with {num_tokens} of {max_tokens} tokens and {reason}"
        elif result.outcome == "failed":
            if KILLED_ERROR not in result.error:
                return f"it failed with: {result.error}"
            if not self._is_after_kill(result.ended_s):
                return f"it failed when the engine had not been killed: {result.error}"
        elif result.plan.cancel_after_s is None and result.plan.cancel_after_tokens is None:
            return "nobody cancelled it"
        return ""

    def _is_after_kill(self, at_s: float) -> bool:
        return any(kill_s <= at_s <= kill_s + RESTART_WINDOW_S for kill_s in self.trouble.kills_s)

    def _check_memory(self) -> None:
        for role in ("server", "stub", "core"):
            before, after, _ = self.watch.growth(role)
            if after - before > MAX_GROWTH_MIB:
                self.problems.append(f"memory of the {role} grew from {before:.0f} to {after:.0f} MiB")


def show(soak: Soak) -> None:
    """Print what happened, then the verdict."""
    table = Table(title="Soak of a real tritonserver")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for figure in figures(soak):
        table.add_row(
            figure.name.removeprefix("soak_").replace("_", " "), f"{figure.value:,.6g} {figure.unit}"
        )
    Console().print(table)
    for problem in soak.problems[:MAX_PROBLEMS_SHOWN]:
        print(f"problem: {problem[:500]}")
    print("PASSED" if not soak.problems else f"FAILED: {len(soak.problems)} problems")


def figures(soak: Soak) -> list[Figure]:
    """All figures, that with the aim first."""
    results = soak.load.results
    outcomes = Counter(result.outcome for result in results)
    num_tokens = sum(result.num_tokens for result in results)
    list_of = [
        Figure("soak_problems", len(soak.problems), "", 0, higher_is_better=False),
        Figure("soak_streams", len(results), ""),
        Figure("soak_completed", outcomes["completed"], ""),
        Figure("soak_cancelled", outcomes["cancelled"], ""),
        Figure("soak_failed_by_kills", outcomes["failed"], ""),
        Figure("soak_engine_stalls", soak.trouble.num_stalls, ""),
        Figure("soak_engine_kills", len(soak.trouble.kills_s), ""),
        Figure("soak_running_at_most", max(g["num_requests_running"] for _, g in soak.watch.gauges), ""),
        Figure("soak_waiting_at_most", max(g["num_requests_waiting"] for _, g in soak.watch.gauges), ""),
        Figure("soak_refusals_during_restarts", len(soak.load.refused_s), ""),
        Figure("soak_tokens_checked", num_tokens, ""),
        Figure("soak_duration", soak.seconds, "s"),
        Figure("soak_rate", num_tokens / soak.seconds, "tokens/s"),
        Figure("soak_free_blocks_at_end", soak.final_gauges["kv_cache_free_blocks"], f"of {NUM_BLOCKS}"),
        Figure("soak_shm_regions_while_running", soak.watch.max_shm_regions, ""),
        Figure("soak_verification", soak.verify_seconds, "s"),
    ]
    for role in ("server", "stub", "core"):
        before, after, slope = soak.watch.growth(role)
        list_of.append(Figure(f"soak_{role}_rss_after_warm_up", before, "MiB"))
        list_of.append(Figure(f"soak_{role}_rss_at_end", after, "MiB"))
        list_of.append(Figure(f"soak_{role}_rss_slope", slope, "MiB/min"))
    return list_of


def charts(soak: Soak) -> list[Chart]:
    """Memory and load over time."""
    watch = soak.watch
    kills = [kill_s - watch.start_s for kill_s in soak.trouble.kills_s]
    memory = [
        Series(role, [at_s for at_s, _, _ in samples], [mib for _, _, mib in samples])
        for role, samples in watch.rss.items()
    ]
    times = [at_s for at_s, _ in watch.gauges]
    load = [
        Series(name, times, [gauges[f"num_requests_{name}"] for _, gauges in watch.gauges])
        for name in ("running", "waiting")
    ]
    return [
        Chart("Memory", "s", "RSS, MiB", memory, kills, "engine killed"),
        Chart("Requests in the engine", "s", "requests", load, kills, "engine killed"),
    ]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds in which requests are sent")
    parser.add_argument("--stall-interval", type=float, default=2.0, help="seconds")
    parser.add_argument("--kill-interval", type=float, default=20.0, help="seconds; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="draw memory and load over time")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def main() -> int:
    """Run, print; the exit status is 0 if nothing was wrong."""
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    soak = Soak(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak.run(Path(folder))
    show(soak)
    if arguments.svg is not None:
        write_svg(arguments.svg, charts(soak))
    headline, *others = figures(soak)
    finish(headline, others, machine, arguments.json)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())

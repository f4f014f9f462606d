"""Ranks as processes that live and die together; what they compute here is fake."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from trtforge.checking.packing import PackedSequences
from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError, DeviceError, ServerError, TrtforgeError
from trtforge.manifest import Manifest
from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.executor import ModelInputs
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.parallel import rank_handle
from trtforge.runtime.parallel.parallel_executor import ParallelExecutor
from trtforge.runtime.request import GenerationRequest, SamplingParams
from trtforge.runtime.scheduling.block_moves import BlockMoves

SCRIPTED_RANK = Path(__file__).with_name("scripted_rank.py")
FAULT_TOKEN = 7
TIMEOUT_S = 30
NUM_BLOCKS = 64
BLOCK_SIZE = 16

Make = Callable[..., ParallelExecutor]


@pytest.fixture(scope="session")
def model_dirs(make_fake_repository: Callable[..., Path]) -> dict[tuple[int, int], Path]:
    """A model for each (tp_size, pp_size)."""
    sizes = [(2, 1), (3, 1), (2, 2)]
    return {
        (tp, pp): make_fake_repository(
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, tp_size=tp, pp_size=pp, max_num_seqs=8
        )
        / "llm"
        / "1"
        for tp, pp in sizes
    }


@pytest.fixture
def make(model_dirs: dict[tuple[int, int], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`make(tp_size, pp_size, fault="RANK FAULT", **options)`: an executor of scripted ranks."""
    made: list[ParallelExecutor] = []

    def make(tp_size: int, pp_size: int, fault: str = "", **options: Any) -> ParallelExecutor:
        monkeypatch.setattr(rank_handle, "RANK_PROGRAM", (str(SCRIPTED_RANK),))
        if fault:
            monkeypatch.setenv("SCRIPT", fault)
        folder = model_dirs[tp_size, pp_size]
        executor = create_executor(Manifest.load(folder), folder, EngineOptions(**options))
        assert isinstance(executor, ParallelExecutor)
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.close()
    assert rank_processes() == []


def rank_processes(parent: int | None = None) -> list[int]:
    """Not those of servers that other tests have left running, which have sessions of their own."""
    return [
        process.pid
        for process in psutil.Process(parent).children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
        and "--control=" in " ".join(process.cmdline())
        and os.getsid(process.pid) == os.getsid(0)
    ]


def vocab_size(folder: Path) -> int:
    return Manifest.load(folder).model.vocab_size


def prefill(*lengths: int, first: int = 3) -> tuple[PackedSequences, ModelInputs]:
    sequences = PackedSequences(BLOCK_SIZE, range(NUM_BLOCKS))
    texts = {str(row): [first + row, *range(20, 19 + length)] for row, length in enumerate(lengths)}
    return sequences, sequences.step(texts)


# --------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize(("tp_size", "pp_size"), [(3, 1), (2, 2)])
def test_steps_and_moves_equal_those_of_one_process(
    make: Make, model_dirs: dict[tuple[int, int], Path], tp_size: int, pp_size: int
) -> None:
    """Prefill of several sizes, decode in moved blocks, rows of logits in any order."""
    swap_bytes = 4 * BLOCK_SIZE * 2 * 4 * tp_size * pp_size  # four blocks of a layer in each rank
    executor = make(tp_size, pp_size, swap_bytes=swap_bytes)
    spec = executor.kv_cache_spec()
    assert (spec.num_blocks, spec.block_size, spec.num_host_blocks) == (NUM_BLOCKS, BLOCK_SIZE, 4)
    single = FakeExecutor(vocab_size(model_dirs[tp_size, pp_size]), NUM_BLOCKS, BLOCK_SIZE, num_host_blocks=4)
    sequences, inputs = prefill(100, 1, 70, 33, 5)
    shuffled = sequences.step({"0": [1, 2], "3": [5]}, [2, 0, 2])
    moves = [
        BlockMoves(swap_out=[(0, 1), (2, 3)], copies=[(4, 50)]),
        BlockMoves(swap_in=[(1, 0), (3, 2)]),
    ]
    for step in (inputs, moves[0], moves[1], shuffled):
        if isinstance(step, BlockMoves):
            executor.move_blocks(step)
            single.move_blocks(step)
        else:
            np.testing.assert_array_equal(executor.execute(step).logits, single.execute(step).logits)


def test_a_larger_step_than_the_limits_is_refused_before_any_rank_hears_of_it(make: Make) -> None:
    executor = make(2, 1)
    _, inputs = prefill(*[3] * 9)
    with pytest.raises(ValueError, match="larger than the model's limits"):
        executor.execute(inputs)
    assert executor.execute(prefill(3)[1]).logits.shape[0] == 3


def test_all_ranks_have_as_many_blocks_as_the_least_of_them(make: Make) -> None:
    executor = make(2, 1, "1 blocks 9")
    assert executor.kv_cache_spec().num_blocks == 9
    with pytest.raises(ValueError, match="block_tables"):
        executor.execute(prefill(9 * BLOCK_SIZE + 1)[1])


def test_each_rank_takes_its_part_of_the_memory(make: Make) -> None:
    """Of a cap for all, on the one machine that they share."""
    block_bytes = BLOCK_SIZE * 2 * 4
    executor = make(2, 2, kv_cache_bytes=4 * 10 * block_bytes, swap_bytes=4 * 3 * block_bytes)
    spec = executor.kv_cache_spec()
    assert (spec.num_blocks, spec.num_host_blocks) == (10, 3)


def test_what_ranks_share_has_no_name(make: Make) -> None:
    """Nobody has to remove it: also of killed processes nothing can stay behind in /dev/shm."""
    executor = make(2, 1)
    for pid in executor.pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/memfd:trtforge-ranks (deleted)" in maps
        assert "/dev/shm" not in maps


# --------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("1 start config", ConfigError, "rank 1 failed: rank file is torn"),
        ("0 start capacity", CapacityError, "rank 0 failed: no memory for a cache"),
        ("1 start raise", DeviceError, "rank 1 failed: RuntimeError: out of luck"),
        ("0 start kill", DeviceError, r"rank 0 died \(signal SIGKILL\)"),
        ("1 late start", ConfigError, "rank 1 failed: the weights are torn"),
    ],
)
def test_a_rank_that_does_not_start(make: Make, fault: str, error: type[TrtforgeError], message: str) -> None:
    with pytest.raises(error, match=message):
        make(2, 1, fault)
    assert rank_processes() == []


def test_options_that_allow_no_block(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"rank \d failed: kv_cache_bytes"):
        make(2, 1, kv_cache_bytes=2)
    assert rank_processes() == []


# --------------------------------------------------------------------------- faults in a step


@pytest.mark.parametrize(
    ("shape", "fault", "message"),
    [
        ((2, 2), "3 raise", "rank 3 failed: RuntimeError: out of luck"),
        ((2, 1), "0 exit", r"rank 0 died \(exit status 3\)"),
        ((2, 2), "1 kill", r"rank 1 died \(signal SIGKILL\)"),
        ((2, 1), "1 hang", r"rank 1 did not finish a step within 1\.8 s"),
        ((2, 1), "0 stop", r"rank 0 did not finish a step within 1\.8 s"),
        ((2, 2), "2 hang with the lock", r"rank 2 did not finish a step within 1\.8 s"),
    ],
)
def test_a_fault_of_one_rank_ends_all_with_its_reason(
    make: Make, shape: tuple[int, int], fault: str, message: str
) -> None:
    executor = make(*shape, fault, step_timeout_s=2 if "hang" in fault or "stop" in fault else 20)
    executor.execute(prefill(40, 3)[1])
    with pytest.raises(DeviceError, match=message):
        executor.execute(prefill(40, 3, first=FAULT_TOKEN)[1])
    assert rank_processes() == []
    with pytest.raises(DeviceError, match=message):
        executor.execute(prefill(3)[1])
    executor.close()
    executor.close()


def test_a_fault_while_blocks_are_moved(make: Make) -> None:
    executor = make(2, 1, "1 moves")
    with pytest.raises(DeviceError, match="rank 1 failed: RuntimeError: no move today"):
        executor.move_blocks(BlockMoves(copies=[(0, 1)]))
    assert rank_processes() == []


def test_a_rank_that_dies_between_steps(make: Make) -> None:
    executor = make(2, 1)
    executor.execute(prefill(3)[1])
    os.kill(executor.pids[1], signal.SIGKILL)
    with pytest.raises(DeviceError, match=r"rank 1 died \(signal SIGKILL\)"):
        executor.execute(prefill(3)[1])
    assert rank_processes() == []


# --------------------------------------------------------------------------- the end


def test_close(make: Make) -> None:
    executor = make(2, 2)
    executor.execute(prefill(3)[1])
    spec = executor.kv_cache_spec()
    executor.close()
    executor.close()
    assert rank_processes() == []
    assert executor.kv_cache_spec() == spec
    with pytest.raises(ServerError, match="closed"):
        executor.execute(prefill(3)[1])


def test_a_rank_that_does_not_stop_is_killed(make: Make) -> None:
    executor = make(2, 1, "1 close")
    executor.close()
    assert rank_processes() == []


def test_an_executor_that_nobody_holds_any_more_has_no_ranks(
    model_dirs: dict[tuple[int, int], Path],
) -> None:
    folder = model_dirs[2, 1]
    executor = create_executor(Manifest.load(folder), folder, EngineOptions())
    assert len(rank_processes()) == 2
    del executor
    gc.collect()
    assert rank_processes() == []


def test_ranks_ignore_the_signals_of_a_terminal(make: Make) -> None:
    executor = make(2, 1)
    for pid in executor.pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert executor.execute(prefill(3)[1]).logits.shape[0] == 3


DRIVER = """
import sys, pathlib
from trtforge.engine_options import EngineOptions
from trtforge.manifest import Manifest
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.parallel import rank_handle
rank_handle.RANK_PROGRAM = (sys.argv[2],)
folder = pathlib.Path(sys.argv[1])
executor = create_executor(Manifest.load(folder), folder, EngineOptions())
print(*executor.pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_ranks_do_not_outlive_a_killed_driver(
    model_dirs: dict[tuple[int, int], Path], is_stopped: bool
) -> None:
    """Not even one that is stopped."""
    command = [sys.executable, "-c", DRIVER, str(model_dirs[2, 2]), str(SCRIPTED_RANK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        ranks = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        assert len(ranks) == 4
        if is_stopped:
            ranks[2].suspend()
        driver.kill()
        driver.wait(TIMEOUT_S)
    _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT_S)
    assert alive == []


# --------------------------------------------------------------------------- below an engine


@pytest.fixture
def long_model_dir(make_fake_repository: Callable[..., Path]) -> Path:
    """Room for a request that no test waits for."""
    return make_fake_repository(num_blocks=8192, max_model_len=8192 * 16, tp_size=2) / "llm" / "1"


class Answer:
    """Collects the outputs of one request."""

    def __init__(self) -> None:
        self.outputs: list[GenerationOutput] = []
        self.started = threading.Event()
        self._finished: queue.SimpleQueue[GenerationOutput] = queue.SimpleQueue()

    def __call__(self, output: GenerationOutput) -> None:
        self.outputs.append(output)
        self.started.set()
        if output.is_final:
            self._finished.put(output)

    def last(self) -> GenerationOutput:
        return self._finished.get(timeout=TIMEOUT_S)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]


def ask(client: EngineClient, max_tokens: int, name: str = "a") -> Answer:
    answer = Answer()
    client.submit(GenerationRequest(name, "Hello", SamplingParams(max_tokens=max_tokens)), answer)
    return answer


def wait_for_restart(client: EngineClient, num_restarts: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not client.is_alive or client.num_restarts < num_restarts:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_engine_whose_rank_is_killed_is_started_again(long_model_dir: Path) -> None:
    """While it works, and while it has nothing to do."""
    client = EngineClient(long_model_dir, EngineOptions())
    client.start()
    try:
        whole = ask(client, 300)
        whole.last()
        answer = ask(client, 100_000)
        assert answer.started.wait(TIMEOUT_S)
        ranks = sorted(rank_processes())
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        last = answer.last()
        assert last.error_kind == "server"
        assert "the engine process died (rank 1 died (signal SIGKILL))" in str(last.error)
        wait_for_restart(client, 1)
        again = ask(client, 300, "b")
        again.last()
        assert again.token_ids == whole.token_ids
        new_ranks = sorted(rank_processes())
        assert len(new_ranks) == 2
        assert set(new_ranks).isdisjoint(ranks)
        os.kill(new_ranks[0], signal.SIGKILL)
        wait_for_restart(client, 2)
    finally:
        client.close()
    assert rank_processes() == []


def test_an_engine_says_which_rank_could_not_start(make_fake_repository: Callable[..., Path]) -> None:
    folder = make_fake_repository(tp_size=2) / "llm" / "1"
    client = EngineClient(folder, EngineOptions(kv_cache_bytes=2))
    with pytest.raises(ConfigError, match=r"rank \d failed: kv_cache_bytes 1"):
        client.start()
    client.close()
    assert rank_processes() == []

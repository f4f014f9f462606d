"""Sums over ranks and hidden states between stages: the same bits for all, and an end to every wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.errors import ConfigError, ServerError
from trtforge.runtime.parallel import memory_communicator as module
from trtforge.runtime.parallel import signals as signals_module
from trtforge.runtime.parallel.communicator import GroupShape
from trtforge.runtime.parallel.memory_communicator import MemoryCommunicator, communicator_bytes
from trtforge.runtime.parallel.shared_memory import SharedMemory
from trtforge.runtime.parallel.signals import PeerFailedError, PeerTimeoutError, Signals

TIMEOUT_S = 30
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
CHUNK = module.REDUCE_CHUNK_BYTES // 4


def make_group(shape: GroupShape, timeout_s: float = TIMEOUT_S) -> list[MemoryCommunicator]:
    memory, fd = SharedMemory.create(communicator_bytes(shape))
    os.close(fd)
    return [MemoryCommunicator(memory, shape, rank, timeout_s=timeout_s) for rank in range(shape.num_ranks)]


def run_all(group: list[MemoryCommunicator], work: Callable[[MemoryCommunicator], Any]) -> list[Any]:
    """What `work` returns on each rank, all of them at the same time."""
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(work, group))


def data(rank: int, size: int, dtype: Any, seed: int = 0) -> Any:
    values = np.random.default_rng([seed, rank]).standard_normal(size, np.float32) * 10.0 ** (rank % 3)
    return values.astype(dtype)


@pytest.fixture(scope="module")
def groups() -> dict[int, list[MemoryCommunicator]]:
    """One group for each size and all examples: slots are reused by arrays of all sizes and types."""
    return {size: make_group(GroupShape(size, 1)) for size in (1, 2, 3, 4)}


@settings(max_examples=40, deadline=None)
@given(
    tp_size=st.sampled_from([1, 2, 3, 4]),
    size=st.one_of(st.integers(0, 300), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])),
    dtype=st.sampled_from(DTYPES),
    repeats=st.integers(1, 3),
    in_place=st.booleans(),
)
def test_sums_are_those_of_float32_in_the_order_of_ranks(
    groups: dict[int, list[MemoryCommunicator]],
    tp_size: int,
    size: int,
    dtype: Any,
    repeats: int,
    in_place: bool,
) -> None:
    def work(communicator: MemoryCommunicator) -> list[bytes]:
        sums = []
        for seed in range(repeats):
            source = data(communicator.rank, size, dtype, seed)
            target = source if in_place else np.empty_like(source)
            communicator.all_reduce(source, target)
            sums.append(target.tobytes())
        return sums

    results = run_all(groups[tp_size], work)
    for seed in range(repeats):
        total = np.zeros(size, np.float32)
        for rank in range(tp_size):
            total += data(rank, size, dtype, seed).astype(np.float32)
        expected = total.astype(dtype)
        for sums in results:
            np.testing.assert_array_equal(np.frombuffer(sums[seed], dtype), expected)
            assert sums[seed] == results[0][seed]


def test_what_is_no_number_is_the_same_everywhere(groups: dict[int, list[MemoryCommunicator]]) -> None:
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3e38], np.float32)

    def work(communicator: MemoryCommunicator) -> bytes:
        values = np.roll(special, communicator.rank)
        with np.errstate(invalid="ignore", over="ignore"):
            communicator.all_reduce(values, values)
        return values.tobytes()

    assert len(set(run_all(groups[3], work))) == 1


def test_arrays_with_gaps_are_refused(groups: dict[int, list[MemoryCommunicator]]) -> None:
    array = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="not C-contiguous"):
        groups[2][0].all_reduce(array.T, array)
    with pytest.raises(ValueError, match="not C-contiguous"):
        groups[2][0].send(array[:, ::2])


@pytest.mark.parametrize("shape", [GroupShape(1, 3), GroupShape(2, 2)])
def test_stages_hand_on_what_they_have(shape: GroupShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, also of several chunks, while sums are made within a stage."""
    monkeypatch.setattr(module, "MAIL_CHUNK_BYTES", 1000)
    sizes = [(1, 64), (7, 64), (0, 64), (50, 33)]

    def work(communicator: MemoryCommunicator) -> list[Any]:
        received = []
        for seed, size in enumerate(sizes):
            array = data(0, size, ml_dtypes.bfloat16, seed)
            if not communicator.is_first:
                array = np.empty_like(array)
                communicator.receive(array)
                received.append(array.astype(np.float32))
            if not communicator.is_last:
                communicator.all_reduce(np.ones(1, np.float32), np.empty(1, np.float32))
                communicator.send(array)
        return received

    for communicator, received in zip((group := make_group(shape)), run_all(group, work), strict=True):
        assert len(received) == (0 if communicator.is_first else len(sizes))
        for seed, array in enumerate(received):
            expected = data(0, sizes[seed], ml_dtypes.bfloat16, seed).astype(np.float32)
            np.testing.assert_array_equal(array, expected)


def test_stages_of_different_builds() -> None:
    first, second = make_group(GroupShape(1, 2))
    first.send(np.zeros((3, 8), np.float32))
    with pytest.raises(ServerError, match="sent 96 bytes and rank 1 waits for 64"):
        second.receive(np.zeros((2, 8), np.float32))


@pytest.mark.parametrize("shape", [GroupShape(1, 1), GroupShape(3, 1), GroupShape(1, 3), GroupShape(2, 2)])
def test_the_first_rank_tells_all_others(shape: GroupShape) -> None:
    group = make_group(shape)
    assert run_all(group, lambda c: c.tell(bytes([c.rank, 255, 0]))) == [b"\0\xff\0"] * shape.num_ranks
    stages = [bytes([shape.peers(rank).start]) for rank in range(shape.num_ranks)]
    assert run_all(group, lambda c: c.tell_stage(bytes([c.rank]))) == stages


def test_nobody_leaves_a_barrier_before_the_last_has_come() -> None:
    arrived: list[int] = []

    def work(communicator: MemoryCommunicator) -> int:
        for number in range(20):
            arrived.append(number)
            communicator.barrier()
            assert arrived.count(number) == 4
            communicator.barrier()
        return communicator.rank

    assert run_all(make_group(GroupShape(2, 2)), work) == [0, 1, 2, 3]


def test_a_rank_that_does_not_come_ends_the_wait() -> None:
    first, _ = make_group(GroupShape(2, 1), timeout_s=0.2)
    with pytest.raises(PeerTimeoutError, match=r"rank 1 did not come within 0\.2 s"):
        first.barrier()


def test_a_failure_ends_all_waits_now_and_later() -> None:
    first, second, third = make_group(GroupShape(3, 1))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(c.all_reduce, np.ones(3), np.ones(3)) for c in (first, second)]
        time.sleep(0.05)
        third.fail()
        for future in waiting:
            with pytest.raises(PeerFailedError, match="failed while rank"):
                future.result(TIMEOUT_S)
    with pytest.raises(PeerFailedError):
        third.barrier()


def test_who_keeps_the_others_waiting() -> None:
    """Ranks 0 and 1 wait for 2; rank 3 for nobody, and rank 4 could go on."""
    shape = GroupShape(5, 1)
    memory, fd = SharedMemory.create(communicator_bytes(shape))
    os.close(fd)
    group = [MemoryCommunicator(memory, shape, rank, timeout_s=TIMEOUT_S) for rank in range(5)]
    looking = Signals(memory, 5)
    threads = [threading.Thread(target=_until_failure, args=(group[rank],)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT_S
    while looking.culprits([0, 1, 2, 3]) != [2, 3]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not looking.has_failed
    looking.fail()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert looking.has_failed


def _until_failure(communicator: MemoryCommunicator) -> None:
    with pytest.raises(PeerFailedError):
        communicator.barrier()


def test_processors_that_reorder_writes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals_module.platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="aarch64"):
        make_group(GroupShape(2, 1))


# --------------------------------------------------------------------------- processes

PROGRAM = """
import sys, hashlib, numpy as np, ml_dtypes
from trtforge.runtime.parallel.communicator import GroupShape
from trtforge.runtime.parallel.memory_communicator import MemoryCommunicator
from trtforge.runtime.parallel.shared_memory import SharedMemory
fd, rank, tp_size, timeout_s = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
communicator = MemoryCommunicator(SharedMemory(fd), GroupShape(tp_size, 1), rank, timeout_s=timeout_s)
digest = hashlib.sha256()
random = np.random.default_rng(rank)
sizes = np.random.default_rng(99).integers(1, 150_000, 150)
for number, size in enumerate(sizes):
    dtype = (np.float32, np.float16, ml_dtypes.bfloat16)[number % 3]
    values = random.standard_normal(size, np.float32).astype(dtype)
    communicator.all_reduce(values, values)
    digest.update(values.tobytes())
print(digest.hexdigest(), flush=True)
sys.stdin.readline()
communicator.barrier()
"""


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """`start_ranks(tp_size, timeout_s)`: processes that print a digest of their sums and wait."""
    processes: list[subprocess.Popen[str]] = []

    def start(tp_size: int, timeout_s: float = TIMEOUT_S) -> list[subprocess.Popen[str]]:
        _, fd = SharedMemory.create(communicator_bytes(GroupShape(tp_size, 1)))
        processes.extend(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(fd), str(rank), str(tp_size), str(timeout_s)],
                pass_fds=[fd],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(tp_size)
        )
        os.close(fd)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_processes_have_the_same_bits(start_ranks: Callable[..., list[subprocess.Popen[str]]]) -> None:
    ranks = start_ranks(3)
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=TIMEOUT_S) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0], outputs
    assert len({output for output, _ in outputs}) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_and_a_stopped_peer_end_the_wait(
    start_ranks: Callable[..., list[subprocess.Popen[str]]], number: signal.Signals
) -> None:
    ranks = start_ranks(2, timeout_s=3)
    for process in ranks:
        assert process.stdout is not None
        assert len(process.stdout.readline()) == 65
    ranks[1].send_signal(number)
    _, errors = ranks[0].communicate("\n", timeout=TIMEOUT_S)
    assert ranks[0].returncode == 1
    assert "PeerTimeoutError: rank 1 did not come within 3 s" in errors

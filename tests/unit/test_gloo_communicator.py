"""Sums over ranks and hidden states between stages, over a network: here each rank is a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from trtforge.runtime.parallel.communicator import Communicator, GroupShape
from trtforge.runtime.parallel.gloo_communicator import GlooCommunicator, open_meeting
from trtforge.runtime.parallel.signals import PeerFailedError, PeerTimeoutError

HOST = "127.0.0.1"
TIMEOUT_S = 60


def run_all(
    shape: GroupShape, work: Callable[[Communicator], Any], timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """What `work` returns on each rank of a new group, all of them at the same time."""
    meeting = open_meeting(HOST)

    def run(rank: int) -> Any:
        place = (HOST, meeting.port)
        return work(GlooCommunicator(shape, rank, own_host=HOST, meeting=place, timeout_s=timeout_s))

    with ThreadPoolExecutor(shape.num_ranks) as pool:
        return [future.result(TIMEOUT_S) for future in [pool.submit(run, r) for r in range(shape.num_ranks)]]


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_sums_are_of_float32_and_the_same_everywhere(tp_size: int) -> None:
    cases = [
        (size, dtype)
        for size in (0, 1, 777, 50_000)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
    ]

    def data(rank: int, size: int, dtype: Any) -> Any:
        values = np.random.default_rng([rank, size]).standard_normal(size, np.float32)
        return values.astype(dtype)

    def work(communicator: Communicator) -> list[Any]:
        sums = []
        for size, dtype in cases:
            source = data(communicator.rank, size, dtype)
            target = np.empty_like(source)
            communicator.all_reduce(source, target)
            np.testing.assert_array_equal(source, data(communicator.rank, size, dtype))
            communicator.all_reduce(source, source)  # in place
            assert source.tobytes() == target.tobytes()
            sums.append(target)
        return sums

    results = run_all(GroupShape(tp_size, 1), work)
    for number, (size, dtype) in enumerate(cases):
        exact = sum(data(rank, size, dtype).astype(np.float64) for rank in range(tp_size))
        for sums in results:
            assert sums[number].tobytes() == results[0][number].tobytes()
            # Of float32 sums, rounded to the type once.
            np.testing.assert_allclose(
                sums[number].astype(np.float64), exact, atol=1e-5, rtol=float(ml_dtypes.finfo(dtype).eps)
            )


@pytest.mark.parametrize("shape", [GroupShape(1, 3), GroupShape(2, 2)])
def test_stages_hand_on_what_they_have(shape: GroupShape) -> None:
    sizes = [(1, 64), (7, 64), (0, 64), (900, 576)]

    def work(communicator: Communicator) -> list[Any]:
        received = []
        for seed, size in enumerate(sizes):
            array = np.random.default_rng(seed).standard_normal(size, np.float32).astype(ml_dtypes.bfloat16)
            if not communicator.is_first:
                array = np.empty_like(array)
                communicator.receive(array)
            received.append(array.astype(np.float32))
            if not communicator.is_last:
                communicator.all_reduce(np.ones(1, np.float32), np.empty(1, np.float32))
                communicator.send(array)
        return received

    for received in run_all(shape, work):
        for seed, array in enumerate(received):
            expected = np.random.default_rng(seed).standard_normal(sizes[seed], np.float32)
            np.testing.assert_array_equal(array, expected.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_first_rank_tells_all_others() -> None:
    shape = GroupShape(2, 2)
    assert run_all(shape, lambda c: (c.tell(bytes([c.rank, 255, 0])), c.host)) == [(b"\0\xff\0", HOST)] * 4


def test_a_rank_that_does_not_come_ends_the_wait() -> None:
    def work(communicator: Communicator) -> None:
        if communicator.rank == 0:
            with pytest.raises(PeerTimeoutError, match=r"rank 0 waited for did not come within 0\.5 s"):
                communicator.all_reduce(np.ones(3, np.float32), np.ones(3, np.float32))
            over.set()
        assert over.wait(TIMEOUT_S)

    over = threading.Event()
    run_all(GroupShape(2, 1), work, timeout_s=0.5)


def test_a_rank_that_is_gone_ends_the_wait() -> None:
    def work(communicator: Communicator) -> None:
        values = np.ones(3, np.float32)
        communicator.all_reduce(values, values)
        if communicator.rank == 1:
            return  # and the connections end with the object
        started = time.monotonic()
        with pytest.raises(PeerFailedError, match="the group failed while rank 0 waited"):
            communicator.all_reduce(values, values)
        assert time.monotonic() - started < TIMEOUT_S / 2

    run_all(GroupShape(2, 1), work)

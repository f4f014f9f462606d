"""A real server of models on several ranks: the tokens of one, and what is left when one of them dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from asking import ask_all, wait_for_answer

from trtforge.client.streaming import Client, SamplingOptions
from trtforge.client.triton_server import Ports, TritonServer
from trtforge.errors import CapacityError, ServerError

pytestmark = pytest.mark.e2e

TIMEOUT_S = 60
NUM_REQUESTS = 24
MAX_TOKENS = 2000

FindEngines = Callable[..., list[psutil.Process]]


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_give_the_tokens_of_one(
    triton_server: Callable[[Path], TritonServer],
    make_sharded_repository: Callable[[int], Path],
    demo_repository: Path,
    tp: int,
) -> None:
    assert ask_all(triton_server(make_sharded_repository(tp))) == ask_all(triton_server(demo_repository))


@pytest.fixture
def repository(make_fake_repository: Callable[..., Path]) -> Path:
    """Two stages of two ranks, with room for all requests at once."""
    return make_fake_repository(
        num_blocks=8192, max_model_len=8192 * 16, max_num_seqs=NUM_REQUESTS, tp_size=2, pp_size=2
    )


@pytest.fixture
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, ports=Ports(http=0, grpc=0, metrics=0), exit_timeout_s=5.0) as server:
        yield server


def find_ranks(engine: psutil.Process) -> list[psutil.Process]:
    """By rank."""
    ranks = {}
    for process in engine.children():
        for option in process.cmdline():
            if option.startswith("--rank="):
                ranks[int(option.removeprefix("--rank="))] = process
    return [ranks[rank] for rank in sorted(ranks)]


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    assert alive == []


@pytest.mark.parametrize("killed", range(4))
def test_a_killed_rank_under_load(
    server: TritonServer, repository: Path, find_engines: FindEngines, killed: int
) -> None:
    """Every request gets its whole answer or the reason; new ones are served, and nobody is left over."""
    (engine,) = find_engines(repository)
    ranks = find_ranks(engine)
    assert len(ranks) == 4
    with Client(server.grpc_url) as client, ThreadPoolExecutor(NUM_REQUESTS) as pool:
        started = threading.Semaphore(0)

        def ask(number: int) -> int | str:
            """How many tokens came, or the error."""
            sampling = SamplingOptions(max_tokens=MAX_TOKENS if number % 2 else 100_000)
            num_tokens = 0
            try:
                for chunk in client.stream(f"Hello {number}", sampling=sampling, timeout_s=TIMEOUT_S):
                    if not num_tokens:
                        started.release()
                    num_tokens += len(chunk.token_ids)
            except ServerError as error:
                return str(error)
            return num_tokens

        asking = [pool.submit(ask, number) for number in range(NUM_REQUESTS)]
        for _ in range(NUM_REQUESTS):
            assert started.acquire(timeout=TIMEOUT_S)
        ranks[killed].kill()
        results = [future.result(TIMEOUT_S) for future in asking]
        failures = [result for result in results if isinstance(result, str)]
        assert len(failures) >= NUM_REQUESTS // 2
        assert all(
            f"the engine process died (rank {killed} died (signal SIGKILL))" in text for text in failures
        )
        assert {result for result in results if isinstance(result, int)} <= {MAX_TOKENS}
        wait_until_gone([engine, *ranks])

        errors = wait_for_answer(client)
        assert all(isinstance(error, CapacityError) for error in errors), errors
    (new_engine,) = find_engines(repository)
    new_ranks = find_ranks(new_engine)
    assert len(new_ranks) == 4
    server.stop()
    wait_until_gone([new_engine, *new_ranks])


def test_a_killed_engine_takes_its_ranks_along(
    server: TritonServer, repository: Path, find_engines: FindEngines
) -> None:
    (engine,) = find_engines(repository)
    ranks = find_ranks(engine)
    ranks[2].suspend()  # one that could not end by itself
    engine.kill()
    wait_until_gone(ranks)
    server.stop()

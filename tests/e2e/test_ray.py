"""A real server of models whose ranks are on nodes of a Ray cluster; here all nodes are on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from asking import ONE_TOKEN, ask_all, wait_for_answer, wait_until

from trtforge.client.streaming import Client, SamplingOptions
from trtforge.client.triton_server import Ports, TritonServer
from trtforge.engine_options import EXECUTOR_VARIABLE
from trtforge.errors import CapacityError, ServerError

pytestmark = pytest.mark.e2e

TIMEOUT_S = 120
NUM_REQUESTS = 8
MAX_TOKENS = 2000
# One CPU, so that two ranks need two nodes.
NODE = ["--num-cpus=1", "--object-store-memory=80000000", "--block"]
ANY_PORTS = ["--min-worker-port=0", "--max-worker-port=0"]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port


class RayCluster:
    """Nodes with processes of their own, which can be killed as a machine can."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        head = [f"--port={port}", "--head", "--include-dashboard=false", f"--temp-dir={folder}"]
        self.add_node([*head, f"--ray-client-server-port={free_port()}"])

    def add_node(self, options: list[str] | None = None) -> None:
        """Returns when the node has joined."""
        if options is None:
            options = [f"--address={self.address}"]
        program = [sys.executable, "-m", "ray.scripts.scripts"]
        log = self._folder / f"node{len(self._nodes)}.log"
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        with log.open("wb") as file:
            self._nodes.append(
                subprocess.Popen(
                    [*program, "start", *NODE, *ANY_PORTS, *options],
                    stdout=file,
                    stderr=file,
                    env=environment,
                    start_new_session=True,
                )
            )
        deadline = time.monotonic() + TIMEOUT_S
        while b"Ray runtime started" not in log.read_bytes():
            if time.monotonic() > deadline or self._nodes[-1].poll() is not None:
                pytest.fail(f"the Ray node did not start: {log.read_text()}")
            time.sleep(0.1)

    def processes(self, node: int) -> list[psutil.Process]:
        """Everything that runs on a node."""
        session = self._nodes[node].pid
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == session:
                    found.append(process)
        return found

    def kill_node(self, node: int) -> None:
        """At once, with all that runs on it."""
        processes = self.processes(node)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._nodes[node].wait(TIMEOUT_S)
        psutil.wait_procs(processes, timeout=TIMEOUT_S)

    def ranks(self) -> list[psutil.Process]:
        """The processes of ranks on all nodes."""
        return [
            process
            for node in range(len(self._nodes))
            for process in self.processes(node)
            if "trtforge.runtime.parallel.rank_process" in " ".join(_command(process))
        ]

    def close(self) -> None:
        for node in reversed(range(len(self._nodes))):
            self.kill_node(node)


def _command(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except psutil.NoSuchProcess:
        return []
    return command


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two nodes."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # paths of sockets have to be short
    cluster = RayCluster(folder)
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def serve(repository: Path, cluster: RayCluster) -> TritonServer:
    return TritonServer(
        repository,
        ports=Ports(http=0, grpc=0, metrics=0),
        exit_timeout_s=5.0,
        environment={EXECUTOR_VARIABLE: "ray", "RAY_ADDRESS": cluster.address},
    )


def test_ranks_on_two_nodes_give_the_tokens_of_one(
    cluster: RayCluster,
    triton_server: Callable[[Path], TritonServer],
    make_sharded_repository: Callable[[int], Path],
    demo_repository: Path,
) -> None:
    with serve(make_sharded_repository(2), cluster) as server:
        assert len({os.getsid(rank.pid) for rank in cluster.ranks()}) == 2
        assert ask_all(server) == ask_all(triton_server(demo_repository))
    wait_until(lambda: not cluster.ranks(), TIMEOUT_S)


def test_a_killed_node_under_load(cluster: RayCluster, make_fake_repository: Callable[..., Path]) -> None:
    """Its requests are told which node is gone; new ones are refused until there is another one, and served
    then."""
    repository = make_fake_repository(num_blocks=8192, max_model_len=8192 * 16, tp_size=2)
    with serve(repository, cluster) as server, Client(server.grpc_url) as client:
        started = threading.Semaphore(0)

        def ask(number: int) -> str:
            sampling = SamplingOptions(max_tokens=100_000)
            try:
                for count, _ in enumerate(client.stream(f"Hello {number}", sampling=sampling)):
                    if count == 0:
                        started.release()
            except ServerError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            asking = [pool.submit(ask, number) for number in range(NUM_REQUESTS)]
            for _ in range(NUM_REQUESTS):
                assert started.acquire(timeout=TIMEOUT_S)
            ranks = cluster.ranks()
            assert len(ranks) == 2
            cluster.kill_node(1)
            for future in asking:
                assert "the engine process died (rank 0 died (the node " in future.result(TIMEOUT_S)
        _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT_S)
        assert alive == []
        with pytest.raises(CapacityError, match="is being restarted"):
            client.generate("Hello", sampling=ONE_TOKEN)
        cluster.add_node()
        errors = wait_for_answer(client, TIMEOUT_S)
        assert all(isinstance(error, CapacityError) for error in errors), errors
        assert len(cluster.ranks()) == 2


def test_without_a_cluster_the_server_says_so(make_fake_repository: Callable[..., Path]) -> None:
    server = TritonServer(
        make_fake_repository(tp_size=2),
        ports=Ports(http=0, grpc=0, metrics=0),
        environment={EXECUTOR_VARIABLE: "ray", "RAY_ADDRESS": f"127.0.0.1:{free_port()}"},
    )
    message = r"the executor ray found no Ray cluster at '127\.0\.0\.1:\d+'"
    with pytest.raises(ServerError, match=message), server:
        pass

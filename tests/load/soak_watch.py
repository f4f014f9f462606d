"""Looks at the processes of a running server while it is under load, and gives its engine trouble."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from trtforge.client.triton_server import TritonServer

SHARED_MEMORY = Path("/dev/shm")
SAMPLE_INTERVAL_S = 0.25
IDLE_TIMEOUT_S = 30.0
STALL_S = (0.2, 0.8)
KILL_DELAY_S = (0.0, 0.03)
WARM_UP_SHARE = 0.25  # of a process's life in which its memory may grow
MIB = 1024 * 1024
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_free_blocks")


class Processes:
    """The server, the stub and the engine core of one TritonServer, by role."""

    def __init__(self, server: TritonServer) -> None:
        guard = server._guard
        if guard is None:
            raise RuntimeError("the server is not running")
        self._guard = psutil.Process(guard.pid)
        # The guard's own arguments name the shared memory that belongs to this server.
        self.shm_prefix = next(str(a) for a in guard.args if str(a).startswith("trtforge_"))
        self.seen: dict[int, psutil.Process] = {}

    def by_role(self) -> dict[str, psutil.Process]:
        """Those alive now; the core is missing while it is being started again."""
        found = {}
        for process in self._guard.children(recursive=True):
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue  # it has just ended
            for role, sign in (
                ("core", "trtforge.runtime.engine.process"),
                ("stub", "triton_python_backend_stub"),
                ("server", "bin/tritonserver"),
            ):
                if sign in command:
                    found[role] = process
                    self.seen[process.pid] = process
                    break
        return found

    def shared_memory(self) -> list[str]:
        """Names of this server's regions."""
        return [path.name for path in SHARED_MEMORY.glob(f"{self.shm_prefix}*")]

    def left_over(self) -> list[int]:
        """Processes that were seen and still run."""
        return [pid for pid, process in self.seen.items() if process.is_running()]


class Watch(threading.Thread):
    """Samples memory and the model's gauges until it is stopped."""

    def __init__(self, server: TritonServer, processes: Processes) -> None:
        super().__init__(name="watch", daemon=True)
        self._server, self._processes = server, processes
        self._stop_event = threading.Event()
        self.start_s = time.monotonic()
        self.rss: defaultdict[str, list[tuple[float, int, float]]] = defaultdict(list)  # (s, pid, MiB)
        self.gauges: list[tuple[float, dict[str, float]]] = []
        self.max_shm_regions = 0

    def run(self) -> None:
        """The thread's."""
        while not self._stop_event.wait(SAMPLE_INTERVAL_S):
            now_s = time.monotonic() - self.start_s
            for role, process in self._processes.by_role().items():
                try:
                    self.rss[role].append((now_s, process.pid, process.memory_info().rss / MIB))
                except psutil.Error:
                    continue  # it has just ended
            self.gauges.append((now_s, read_gauges(self._server)))
            self.max_shm_regions = max(self.max_shm_regions, len(self._processes.shared_memory()))

    def stop(self) -> None:
        """No sample is taken after this."""
        self._stop_event.set()
        self.join()

    def growth(self, role: str) -> tuple[float, float, float]:
        """MiB after warm-up, MiB at the end, and slope in MiB a minute, in the longest life of that role."""
        lives: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        for at_s, pid, mib in self.rss[role]:
            lives[pid].append((at_s, mib))
        life = max(lives.values(), key=len)
        steady = life[int(len(life) * WARM_UP_SHARE) :]
        times, mib = np.array(steady).T
        part = max(1, len(steady) // 5)
        slope = np.polyfit(times / 60, mib, 1)[0] if len(steady) > 2 else 0.0
        return float(np.median(mib[:part])), float(np.median(mib[-part:])), float(slope)


def read_gauges(server: TritonServer) -> dict[str, float]:
    """The model's gauges of requests and blocks."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {
        name: float(line.split()[-1])
        for name in GAUGES
        for line in lines
        if line.startswith(f"trtforge_{name}{{")
    }


def gauges_when_idle(server: TritonServer) -> dict[str, float]:
    """The gauges once nothing runs or waits, and an engine that was killed has its blocks again, or after
    IDLE_TIMEOUT_S."""
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        time.sleep(0.2)  # gauges are set every 50 ms
        gauges = read_gauges(server)
        busy = gauges["num_requests_running"] + gauges["num_requests_waiting"]
        if (not busy and gauges["kv_cache_free_blocks"]) or time.monotonic() > deadline_s:
            return gauges


class Trouble:
    """Holds the engine core up at random moments, and kills it in some of them.

    Clients are slower than the engine without a model. While the core is stopped requests pile up: it goes
    on with full batches and preemptions, and when it is killed soon after, it is at work on many streams.
    """

    def __init__(self, processes: Processes, stall_interval_s: float, kill_interval_s: float) -> None:
        self._processes = processes
        self._stall_interval_s = stall_interval_s
        self._kill_interval_s = kill_interval_s
        self.num_stalls = 0
        self.kills_s: list[float] = []  # on the monotonic clock

    async def run(self) -> None:
        """Until cancelled."""
        moments = random.Random(0)
        next_kill_s = time.monotonic() + self._kill_interval_s * moments.uniform(0.6, 1.4)
        while True:
            await asyncio.sleep(self._stall_interval_s * moments.uniform(0.5, 1.5))
            core = self._processes.by_role().get("core")
            if core is None:
                continue  # it is being started
            try:
                await self._stall(core, moments.uniform(*STALL_S))
                if self._kill_interval_s and time.monotonic() > next_kill_s:
                    await asyncio.sleep(moments.uniform(*KILL_DELAY_S))
                    core.kill()
                    self.kills_s.append(time.monotonic())
                    next_kill_s += self._kill_interval_s * moments.uniform(0.6, 1.4)
            except psutil.NoSuchProcess:
                continue

    async def _stall(self, core: psutil.Process, seconds: float) -> None:
        core.suspend()
        try:
            await asyncio.sleep(seconds)
        finally:
            core.resume()
        self.num_stalls += 1

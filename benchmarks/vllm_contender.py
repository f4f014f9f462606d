"""vLLM's scheduler as a contender of benchmarks/host_overhead.py: starts its process and talks to it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trtforge.errors import ConfigError

VLLM_SCHEDULER = Path(__file__).with_name("vllm_scheduler.py")


class Vllm:
    """vLLM's scheduler in its own process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.version = str(self._answer()["version"])
        self.times: dict[int, list[tuple[float, float]]] = {}  # by size: (schedule, update) of each round

    def measure(self, prompt_lengths: list[int], num_blocks: int, warm_up_steps: int, steps: int) -> None:
        """One round of one size."""
        workload = {
            "prompt_lengths": prompt_lengths,
            "num_blocks": num_blocks,
            "warm_up_steps": warm_up_steps,
            "steps": steps,
        }
        self._process.stdin.write(json.dumps(workload) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        times = self.times.setdefault(len(prompt_lengths), [])
        times.append((answer["schedule_us"], answer["update_us"]))

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"vLLM ended with status {self._process.wait()}, see its messages above")
        return json.loads(line)


@contextmanager
def running_vllm(python: str) -> Iterator[Vllm]:
    """Start the contender; it ends with the context."""
    # Its own libraries, not those of this environment.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    command = [python, str(VLLM_SCHEDULER)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd="/"
    )
    try:
        yield Vllm(process)
    finally:
        process.kill()
        process.wait()

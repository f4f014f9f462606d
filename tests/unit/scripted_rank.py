"""A rank's process in which things go wrong on purpose.

    scripted_rank.py --rank N --control FD --memory FD

It runs the real program with the fake executor, which here meets the other ranks in every step. The
environment variable SCRIPT is "RANK FAULT": what happens in that rank, at its start or in a step whose first
token is FAULT_TOKEN.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError
from trtforge.manifest import Manifest
from trtforge.runtime.executor import Executor, KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.create import create_rank_executor
from trtforge.runtime.parallel import rank_process
from trtforge.runtime.parallel.communicator import Communicator
from trtforge.runtime.parallel.rank_view import RankContext
from trtforge.runtime.scheduling.block_moves import BlockMoves

FAULT_TOKEN = 7


class ScriptedExecutor:
    """Adds up and hands on the tokens of a step, and checks what comes back."""

    def __init__(self, executor: Executor, communicator: Communicator, fault: str) -> None:
        self._executor = executor
        self._communicator = communicator
        self._fault = fault

    def kv_cache_spec(self) -> KVCacheSpec:
        return self._executor.kv_cache_spec()

    def move_blocks(self, moves: BlockMoves) -> None:
        if self._fault == "moves":
            raise RuntimeError("no move today")
        self._executor.move_blocks(moves)

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        communicator = self._communicator
        tokens = inputs.input_ids.astype(np.float32)
        if not communicator.is_first:
            handed = np.empty_like(tokens)
            communicator.receive(handed)
            np.testing.assert_array_equal(handed, tokens)
        for _ in range(3):
            total = tokens * (communicator.rank + 1)
            communicator.all_reduce(total, total)
            factors = sum(peer + 1 for peer in communicator.shape.peers(communicator.rank))
            np.testing.assert_array_equal(total, tokens * factors)
            if inputs.input_ids[0] == FAULT_TOKEN:
                commit(self._fault)
        if not communicator.is_last:
            communicator.send(tokens)
        return self._executor.execute(inputs)

    def close(self) -> None:
        self._executor.close()
        if self._fault == "close":
            time.sleep(600)


def commit(fault: str) -> None:
    match fault:
        case "raise":
            raise RuntimeError("out of luck")
        case "config":
            raise ConfigError("rank file is torn")
        case "capacity":
            raise CapacityError("no memory for a cache")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(600)
        case "hang with the lock":
            ctypes.PyDLL(None).sleep(600)


def create(manifest: Manifest, model_dir: Path, options: EngineOptions, context: RankContext) -> Any:
    rank, _, fault = os.environ.get("SCRIPT", "-1 none").partition(" ")
    mine = fault if int(rank) == context.communicator.rank else "none"
    if mine.startswith("start "):
        commit(mine.removeprefix("start "))
    if mine.startswith("blocks "):
        layout = manifest.kv_cache.model_copy(update={"num_blocks": int(mine.removeprefix("blocks "))})
        manifest = manifest.model_copy(update={"kv_cache": layout})
    if mine == "late start":
        agree = context.agree

        def fail_after(budget: Any) -> Any:
            agree(budget)
            raise ConfigError("the weights are torn")

        context = replace(context, agree=fail_after)
    executor = create_rank_executor(manifest, model_dir, options, context)
    return ScriptedExecutor(executor, context.communicator, mine)


if __name__ == "__main__":
    rank_process.create_rank_executor = create
    rank_process.main()

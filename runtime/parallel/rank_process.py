"""One rank of a model as a process of its own.

    python -m trtforge.runtime.parallel.rank_process --rank N --control FD --memory FD

Started by `trtforge.runtime.parallel.rank_handle`, which holds the other end of the socket. The process ends
with its driver, whatever it is doing then. It ignores the signals of a terminal or a service manager.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import select
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError, ServerError, TrtforgeError
from trtforge.manifest import Manifest
from trtforge.runtime.engine.messages import Channel
from trtforge.runtime.executor import Executor
from trtforge.runtime.executors.create import create_rank_executor
from trtforge.runtime.executors.memory_budget import MemoryBudget
from trtforge.runtime.parallel.group_memory import GroupMemory
from trtforge.runtime.parallel.messages import (
    Agreed,
    Close,
    Done,
    Failed,
    FailureKind,
    FromRank,
    Load,
    Loaded,
    Moves,
    Planned,
    Step,
    ToRank,
    rank_end,
)
from trtforge.runtime.parallel.micro_batches import split_step
from trtforge.runtime.parallel.rank_view import RankContext, cache_share, rank_manifest
from trtforge.runtime.parallel.shared_memory import SharedMemory
from trtforge.runtime.parallel.signals import PeerFailedError
from trtforge.runtime.parallel.step_memory import StepSizes
from trtforge.runtime.scheduling.block_moves import BlockMoves

logger = logging.getLogger(__name__)

RankChannel = Channel[FromRank, ToRank]

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Execute steps until told to stop. The exit status is 0 then."""
    parser = argparse.ArgumentParser(prog="rank_process")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--memory", type=int, required=True)
    arguments = parser.parse_args()
    _end_with_driver(arguments.control)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank: int = arguments.rank
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)s rank {rank}[%(process)d] %(name)s: %(message)s",
    )
    channel = rank_end(Connection(arguments.control))
    memory = SharedMemory(arguments.memory)
    os.close(arguments.memory)
    try:
        sys.exit(_serve(rank, channel, memory))
    except (EOFError, OSError):
        sys.exit(0)  # the driver is gone: see _end_with_driver


def _end_with_driver(control: int) -> None:
    """End this process at once when the driver dies or leaves, also within native code.

    The signal comes when the thread ends that started this process; the socket's end when its process does.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(control, select.POLLRDHUP)
    # It may have died before the signal was asked for.
    if poll.poll(0):
        os._exit(0)

    def watch() -> None:
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _serve(rank: int, channel: RankChannel, memory: SharedMemory) -> int:
    load = channel.receive()
    if not isinstance(load, Load):
        raise TypeError(f"rank {rank} was told {type(load).__name__} before it had a model")
    try:
        model_dir = Path(load.model_dir)
        options = EngineOptions.model_validate_json(load.options)
        manifest = Manifest.model_validate_json(load.manifest)
        group = GroupMemory(memory, manifest)
        communicator = group.communicator(rank, options.step_timeout_s)
    except Exception as error:
        logger.exception("loading failed")
        channel.send(Failed(_text(error), _kind(error)))
        return TrtforgeError.exit_code
    try:
        share = cache_share(manifest, rank)
        context = RankContext(communicator, share, lambda budget: _agree(channel, budget))
        executor = create_rank_executor(rank_manifest(manifest, rank), model_dir, options, context)
        gc.freeze()  # what was made so far stays: the collector need not look at it again
        worker = RankWorker(executor, group, manifest.ranks[rank].logits_columns)
        channel.send(Loaded())
        worker.run(channel)
        executor.close()
    except PeerFailedError as error:
        logger.error("%s", error)  # the culprit tells why
        return ServerError.exit_code
    except Exception as error:
        logger.exception("the rank failed")
        # First the reason: whoever ends because the group has failed has none.
        channel.send(Failed(_text(error), _kind(error)))
        communicator.fail()
        return TrtforgeError.exit_code
    logger.info("rank stopped")
    return 0


def _agree(channel: RankChannel, budget: MemoryBudget) -> MemoryBudget:
    channel.send(Planned(budget.num_blocks, budget.num_host_blocks))
    answer = channel.receive()
    if not isinstance(answer, Agreed):
        raise TypeError(f"the driver said {type(answer).__name__}, not how many blocks there are")
    return replace(budget, num_blocks=answer.num_blocks, num_host_blocks=answer.num_host_blocks)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, TrtforgeError) else f"{type(error).__name__}: {error}"


def _kind(error: Exception) -> FailureKind:
    if isinstance(error, ConfigError):
        return "config"
    return "capacity" if isinstance(error, CapacityError) else "server"


class RankWorker:
    """Does what the driver says with one rank's executor."""

    def __init__(self, executor: Executor, group: GroupMemory, logits_columns: tuple[int, int]) -> None:
        self._executor = executor
        self._steps = group.steps
        self._num_parts = group.shape.pp_size
        self._columns = slice(*logits_columns)

    def run(self, channel: RankChannel) -> None:
        """Return when the driver wants no more. Raises what the executor raises."""
        while True:
            message = channel.receive()
            match message:
                case Step(sizes):
                    self._execute(sizes)
                case Moves(swap_out, swap_in, copies):
                    self._executor.move_blocks(BlockMoves(swap_out, swap_in, copies))
                case Close():
                    return
                case _:
                    raise TypeError(f"the driver said {type(message).__name__} to a rank that takes steps")
            channel.send(Done())

    def _execute(self, sizes: StepSizes) -> None:
        logits = self._steps.logits(sizes.R)[:, self._columns]
        for part in split_step(self._steps.read(sizes), self._num_parts):
            outputs = self._executor.execute(part.inputs)
            if not logits.shape[1] or not part.num_wanted:
                continue
            if part.num_wanted == len(logits):
                logits[:] = outputs.logits
            else:
                logits[part.is_wanted] = outputs.logits


if __name__ == "__main__":
    main()

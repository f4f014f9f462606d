"""One rank of a model as a process of its own.

    python -m trtforge.runtime.parallel.rank_process --rank N --control FD [--memory FD]

Started by `trtforge.runtime.parallel.rank_handle`: in the driver, which holds the other end of the socket, or
on another machine. Without memory that all ranks share, they meet over the network. The process ends with its
driver, whatever it is doing then. It ignores the signals of a terminal or a service manager.
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
from trtforge.runtime.parallel.group_access import GroupAccess, Membership, MemoryAccess, NetworkAccess
from trtforge.runtime.parallel.messages import (
    Agreed,
    Close,
    Done,
    Failed,
    FailureKind,
    FromRank,
    Load,
    Loaded,
    Meet,
    Met,
    Moves,
    Planned,
    Step,
    ToRank,
    rank_end,
)
from trtforge.runtime.parallel.micro_batches import split_step
from trtforge.runtime.parallel.rank_view import RankContext, cache_share, rank_manifest, share_threads
from trtforge.runtime.parallel.shared_memory import SharedMemory
from trtforge.runtime.parallel.signals import PeerFailedError
from trtforge.runtime.parallel.step_exchange import StepReceiver
from trtforge.runtime.scheduling.block_moves import BlockMoves

logger = logging.getLogger(__name__)

RankChannel = Channel[FromRank, ToRank]

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Execute steps until told to stop. The exit status is 0 then."""
    parser = argparse.ArgumentParser(prog="rank_process")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--memory", type=int)
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
    access: GroupAccess
    if arguments.memory is None:
        access = NetworkAccess(arguments.control)
    else:
        access = MemoryAccess(SharedMemory(arguments.memory))
        os.close(arguments.memory)
    try:
        sys.exit(_serve(rank, channel, access))
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


def _serve(rank: int, channel: RankChannel, access: GroupAccess) -> int:
    membership: Membership | None = None
    try:
        load = _wait_for_load(rank, channel, access)
        options = EngineOptions.model_validate_json(load.options)
        manifest = Manifest.model_validate_json(load.manifest)
        membership = access.join(rank, load, manifest, options.step_timeout_s)
        executor = _create(rank, channel, load, manifest, options, membership)
        gc.freeze()  # what was made so far stays: the collector need not look at it again
        worker = RankWorker(executor, membership.steps, manifest.pp_size)
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
        if membership is not None:
            membership.communicator.fail()
        return TrtforgeError.exit_code
    logger.info("rank stopped")
    return 0


def _wait_for_load(rank: int, channel: RankChannel, access: GroupAccess) -> Load:
    message = channel.receive()
    if isinstance(message, Meet):
        channel.send(Met(access.meet(rank)))
        message = channel.receive()
    if not isinstance(message, Load):
        raise TypeError(f"rank {rank} was told {type(message).__name__} before it had a model")
    return message


def _create(
    rank: int,
    channel: RankChannel,
    load: Load,
    manifest: Manifest,
    options: EngineOptions,
    membership: Membership,
) -> Executor:
    here = [other for other, node in enumerate(load.nodes) if node == load.nodes[rank]]
    context = RankContext(
        membership.communicator,
        cache_share=cache_share(manifest, rank, range(len(manifest.ranks))),
        node_share=cache_share(manifest, rank, here),
        device=load.devices[rank],
        agree=lambda budget: _agree(channel, budget),
    )
    options = share_threads(options, len(here))
    return create_rank_executor(rank_manifest(manifest, rank), Path(load.model_dir), options, context)


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

    def __init__(self, executor: Executor, steps: StepReceiver, max_parts: int) -> None:
        """A step is divided into `max_parts` at most."""
        self._executor = executor
        self._steps = steps
        self._max_parts = max_parts

    def run(self, channel: RankChannel) -> None:
        """Return when the driver wants no more. Raises what the executor raises."""
        while True:
            message = channel.receive()
            match message:
                case Step():
                    channel.send(self._execute(message))
                case Moves(swap_out, swap_in, copies):
                    self._executor.move_blocks(BlockMoves(swap_out, swap_in, copies))
                    channel.send(Done())
                case Close():
                    return
                case _:
                    raise TypeError(f"the driver said {type(message).__name__} to a rank that takes steps")

    def _execute(self, step: Step) -> Done:
        logits = self._steps.logits(step.sizes.R)
        for part in split_step(self._steps.read(step), self._max_parts):
            outputs = self._executor.execute(part.inputs)
            if not logits.shape[1] or not part.num_wanted:
                continue
            if part.num_wanted == len(logits):
                logits[:] = outputs.logits
            else:
                logits[part.is_wanted] = outputs.logits
        return self._steps.answer(logits)


if __name__ == "__main__":
    main()

"""The engine core as a process of its own.

    python -m trtforge.runtime.engine_process --model-dir DIR --fd N --options JSON

Started by `trtforge.runtime.engine_client`, which holds the other end of the socket `fd`. The process
lives exactly as long as that end is open: it ignores the signals of a terminal or a service manager, so
that requests in flight can finish while the server shuts down.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, RequestError, TrtforgeError
from trtforge.manifest import Manifest
from trtforge.runtime.engine_core import EngineCore
from trtforge.runtime.executors import create_executor
from trtforge.runtime.messages import (
    Add,
    Channel,
    FromEngine,
    Outputs,
    Ready,
    Refused,
    Shutdown,
    StartupFailed,
    ToEngine,
    engine_end,
)
from trtforge.runtime.request import EngineRequest
from trtforge.runtime.watchdog import StepWatchdog

logger = logging.getLogger(__name__)

EngineChannel = Channel[FromEngine, ToEngine]
Inbox = queue.SimpleQueue[ToEngine]


def main() -> None:
    """Serve until told to stop. The exit status is 0 then, else that of the error."""
    parser = argparse.ArgumentParser(prog="engine_process")
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--options", type=EngineOptions.model_validate_json, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s engine[%(process)d] %(name)s: %(message)s"
    )
    channel = engine_end(Connection(arguments.fd))
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(channel, inbox), name="receiver", daemon=True).start()
    try:
        status = _serve(arguments.model_dir, arguments.options, channel, inbox)
    except Exception:
        logger.critical("the engine crashed", exc_info=True)
        status = TrtforgeError.exit_code
    sys.exit(status)


def _receive(channel: EngineChannel, inbox: Inbox) -> None:
    """Empty the socket at once, whatever the engine does, so that the client's sends never wait.

    When the client is gone there is nobody to work for and nothing to save: the process ends on the
    spot, even in the middle of loading a model.
    """
    try:
        while True:
            inbox.put(channel.receive())
    except (EOFError, OSError):
        os._exit(0)


def _serve(model_dir: Path, options: EngineOptions, channel: EngineChannel, inbox: Inbox) -> int:
    try:
        manifest = Manifest.load(model_dir)
        executor = create_executor(manifest, model_dir, options)
        core = EngineCore(executor, manifest.limits, manifest.model.eos_token_ids, manifest.model.vocab_size)
    except TrtforgeError as error:
        channel.send(StartupFailed(str(error)))
        return error.exit_code
    except Exception as error:
        logger.exception("loading %s failed", model_dir)
        channel.send(StartupFailed(f"loading {model_dir} failed: {type(error).__name__}: {error}"))
        return TrtforgeError.exit_code
    spec = executor.kv_cache_spec()
    channel.send(Ready(num_blocks=spec.num_blocks, block_size=spec.block_size))
    run(core, channel, inbox, StepWatchdog(options.step_timeout_s))
    executor.close()
    logger.info("engine stopped")
    return 0


def run(core: EngineCore, channel: EngineChannel, inbox: Inbox, watchdog: StepWatchdog) -> None:
    """Step while there is work, wait for messages while there is none; return on Shutdown.

    What escapes from a step ends the process: nothing is known about the core's state then.
    """
    while True:
        while not (core.has_work() and inbox.empty()):
            message = inbox.get()
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Add):
                _add(core, message.request, channel)
            else:
                core.cancel(message.request_id)
        with watchdog:
            outputs = core.step()
        # Also without outputs: the client takes an engine that is silent for too long for dead.
        channel.send(Outputs(outputs, core.stats))


def _add(core: EngineCore, request: EngineRequest, channel: EngineChannel) -> None:
    try:
        core.add_request(request)
    except RequestError as error:
        channel.send(Refused(request.request_id, str(error), "request"))
    except CapacityError as error:
        channel.send(Refused(request.request_id, str(error), "capacity"))


if __name__ == "__main__":
    main()

"""The engine core as a process of its own.

    python -m trtforge.runtime.engine.process --model-dir DIR --fd N --options JSON

Started by `trtforge.runtime.engine.client`, which holds the other end of the socket `fd`. The process
lives exactly as long as that end is open: it ignores the signals of a terminal or a service manager, so
that requests in flight can finish while the server shuts down.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import queue
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, RequestError, TrtforgeError
from trtforge.manifest import Manifest
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.engine.messages import (
    Add,
    Cancel,
    Channel,
    Crashed,
    FromEngine,
    Outputs,
    Ready,
    Refused,
    Shutdown,
    StartupFailed,
    ToEngine,
    engine_end,
)
from trtforge.runtime.engine.watchdog import StepWatchdog
from trtforge.runtime.executors.create import create_executor
from trtforge.runtime.outputs import EngineOutput
from trtforge.runtime.request import EngineRequest
from trtforge.runtime.sampling.grammar import CompiledGrammar, GrammarCompiler

logger = logging.getLogger(__name__)

EngineChannel = Channel[FromEngine, ToEngine]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A request whose grammar is compiled, or why it cannot be."""

    request: EngineRequest
    grammar: CompiledGrammar | RequestError


@dataclass(frozen=True, slots=True)
class ExecutorFailed:
    """The executor is of no use any more, though it had nothing to do."""

    error: TrtforgeError


Inbox = queue.SimpleQueue[ToEngine | Compiled | ExecutorFailed]


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
    except Exception as error:
        logger.critical("the engine crashed", exc_info=True)
        channel.send(
            Crashed(str(error) if isinstance(error, TrtforgeError) else f"{type(error).__name__}: {error}")
        )
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
        executor = create_executor(
            manifest, model_dir, options, on_failure=lambda error: inbox.put(ExecutorFailed(error))
        )
        model = manifest.model
        core = EngineCore(
            executor,
            manifest.limits,
            model.eos_token_ids,
            model.vocab_size,
            options,
            window=manifest.kv_cache.window,
        )
        grammars = GrammarWorker(
            GrammarCompiler(model_dir / manifest.tokenizer, model.vocab_size, model.eos_token_ids), inbox
        )
    except TrtforgeError as error:
        channel.send(StartupFailed(str(error)))
        return error.exit_code
    except Exception as error:
        logger.exception("loading %s failed", model_dir)
        channel.send(StartupFailed(f"loading {model_dir} failed: {type(error).__name__}: {error}"))
        return TrtforgeError.exit_code
    gc.freeze()  # what was made so far stays: the collector need not look at it again
    spec = executor.kv_cache_spec()
    channel.send(Ready(num_blocks=spec.num_blocks, block_size=spec.block_size))
    run(core, channel, inbox, grammars, StepWatchdog(options.step_timeout_s))
    executor.close()
    logger.info("engine stopped")
    return 0


def run(
    core: EngineCore, channel: EngineChannel, inbox: Inbox, grammars: GrammarWorker, watchdog: StepWatchdog
) -> None:
    """Step while there is work, wait for messages while there is none; return on Shutdown.

    What escapes from a step ends the process, as does what befalls the executor between steps: nothing is
    known about the core's state then.
    """
    while True:
        while not (core.has_work() and inbox.empty()):
            if not core.has_work():
                watchdog.disarm()
            message = inbox.get()
            if isinstance(message, Shutdown):
                core.close()
                watchdog.disarm()
                return
            _take(message, core, channel, grammars)
        # Until the next step begins, since this one ends with the executor at work on the next.
        watchdog.arm()
        outputs = core.step()
        # Also without outputs: the client takes an engine that is silent for too long for dead.
        channel.send(Outputs(outputs, core.stats))


def _take(
    message: Add | Cancel | Compiled | ExecutorFailed,
    core: EngineCore,
    channel: EngineChannel,
    grammars: GrammarWorker,
) -> None:
    match message:
        case Add(request) if request.sampling.guided is not None:
            grammars.submit(request)
        case Add(request):
            _add(core, request, None, channel)
        case Compiled(request, grammar):
            if grammars.finish(request.request_id):
                _add(core, request, grammar, channel)
            else:
                stats = msgspec.structs.replace(core.stats, step_s=0.0)  # of the last step: told already
                channel.send(Outputs([EngineOutput(request.request_id, (), "cancelled")], stats))
        case Cancel(request_id, index):
            grammars.cancel(request_id)
            core.cancel(request_id, index)
        case ExecutorFailed(error):
            raise error


def _add(
    core: EngineCore,
    request: EngineRequest,
    grammar: CompiledGrammar | RequestError | None,
    channel: EngineChannel,
) -> None:
    try:
        if isinstance(grammar, RequestError):
            raise grammar
        core.add_request(request, grammar)
    except RequestError as error:
        channel.send(Refused(request.request_id, str(error), "request"))
    except CapacityError as error:
        channel.send(Refused(request.request_id, str(error), "capacity"))


class GrammarWorker:
    """Compiles grammars beside the steps: a large one takes seconds, which nobody else should wait."""

    def __init__(self, compiler: GrammarCompiler, inbox: Inbox) -> None:
        self._compiler = compiler
        self._inbox = inbox
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling: dict[str, bool] = {}  # request id: whether it is still wanted

    def submit(self, request: EngineRequest) -> None:
        """Put the request into the inbox again when its grammar is compiled."""
        self._compiling[request.request_id] = True
        self._worker.submit(self._compile, request)

    def cancel(self, request_id: str) -> None:
        """The request is no longer wanted, should its grammar be waited for."""
        if request_id in self._compiling:
            self._compiling[request_id] = False

    def finish(self, request_id: str) -> bool:
        """The inbox has given it back; whether it is still wanted."""
        return self._compiling.pop(request_id)

    def _compile(self, request: EngineRequest) -> None:
        guided = request.sampling.guided
        if guided is None:
            return
        try:
            grammar: CompiledGrammar | RequestError = self._compiler.compile(guided)
        except RequestError as error:
            grammar = error
        except Exception as error:
            logger.exception("the grammar of request %s could not be compiled", request.request_id)
            grammar = RequestError(f"the guide cannot be used: {type(error).__name__}: {error}")
        self._inbox.put(Compiled(request, grammar))


if __name__ == "__main__":
    main()

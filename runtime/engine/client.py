"""The engine as its callers see it: text or token ids in, text out, whatever process it runs in.

Threads: `submit` and `cancel` may be called from any, outputs come from one reader thread. The engine
itself is `trtforge.runtime.engine.process`; when it dies, its requests fail and it is started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, RequestError, ServerError, TrtforgeError
from trtforge.manifest import Manifest
from trtforge.runtime.beam_search import BeamSearches, BeamSearchModel
from trtforge.runtime.engine.handle import EngineHandle
from trtforge.runtime.engine.messages import Add, Cancel, Outputs, Refused
from trtforge.runtime.engine.request_stream import OnOutput, RequestStream
from trtforge.runtime.outputs import EngineOutput, EngineStats, GenerationOutput
from trtforge.runtime.request import EngineRequest, ErrorKind, GenerationRequest
from trtforge.runtime.text.tokenizer import Tokenizer
from trtforge.runtime.text.word_tokens import bad_words_token_ids

logger = logging.getLogger(__name__)

RESTART_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # the last one again and again


class EngineClient:
    """Generates with the model in `model_dir`, in an engine process of its own.

    `on_step` gets the engine's statistics after each step and when it has started; it is called like
    `on_output` of a request, and must not raise. Raises ConfigError if the manifest or the tokenizer cannot
    be read.
    """

    def __init__(
        self, model_dir: Path, options: EngineOptions, on_step: Callable[[EngineStats], None] | None = None
    ) -> None:
        self.manifest = Manifest.load(model_dir)
        self.tokenizer = Tokenizer(model_dir / self.manifest.tokenizer)
        self._model_dir = model_dir
        self._options = options
        self._on_step = on_step
        # Guards what follows and the sending end of the engine's socket. Never held while a caller's
        # code runs; sends under it do not wait, since the engine always empties its socket.
        self._lock = threading.Lock()
        self._engine: EngineHandle | None = None  # the current one, ready or not
        self._is_ready = False
        self._stats = EngineStats()
        self._num_restarts = 0
        self._streams: dict[str, RequestStream] = {}  # by engine id
        # A caller may use a request id again as soon as its request has ended, when the engine can still
        # be about to answer the old one: the engine gets ids that never repeat.
        self._engine_ids: dict[str, str] = {}
        self._next_number = itertools.count(1)
        self._beam_searches = BeamSearches(
            BeamSearchModel(
                self.submit,
                self.cancel,
                self.tokenizer.decode,
                self.manifest.model.eos_token_ids,
                self.manifest.limits.max_model_len,
            )
        )
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._run, name="engine-reader", daemon=True)

    def start(self) -> None:
        """Start the engine; returns when it is ready. Raises ConfigError or ServerError if it cannot be."""
        self._start_engine()
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken now: not before the start, after the end, or during a restart."""
        return self._is_ready and not self._closing.is_set()

    @property
    def stats(self) -> EngineStats:
        """How busy the engine was when it was last heard of."""
        return self._stats

    @property
    def num_restarts(self) -> int:
        """How often an engine that had died was started again."""
        return self._num_restarts

    def submit(self, request: GenerationRequest, on_output: OnOutput) -> None:
        """Start a request; `on_output` gets its outputs, the last of which is final.

        `on_output` runs in the reader thread and must not wait for anything; if it raises, its request
        is cancelled. Raises RequestError for a request that cannot be served, CapacityError while
        the engine restarts, ServerError after `close`.
        """
        prompt = self._encode(request.prompt)
        if request.timeout_s is None and self._options.default_timeout_s:
            request = dataclasses.replace(request, timeout_s=self._options.default_timeout_s)
        if request.sampling.beam_width > 1:
            self._beam_searches.start(request, prompt, on_output)
        else:
            self._submit(request, prompt, on_output)

    def cancel(self, request_id: str) -> None:
        """End a request early: its last output will have finish_reason "cancelled", unless it ended
        otherwise just before. Unknown and ended ids are ignored."""
        if self._beam_searches.cancel(request_id):
            return
        with self._lock:
            if request_id in self._engine_ids:
                self._send(Cancel(self._engine_ids[request_id]))

    def _submit(self, request: GenerationRequest, prompt: tuple[int, ...], on_output: OnOutput) -> None:
        sampling = request.sampling
        if sampling.seed is None and sampling.temperature > 0:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(64))
        if sampling.bad_words:
            token_ids = bad_words_token_ids(self.tokenizer, sampling.bad_words)
            token_ids += sampling.bad_words_token_ids
            sampling = dataclasses.replace(sampling, bad_words_token_ids=token_ids)
        engine_id = f"{request.request_id}#{next(self._next_number)}"
        stream = RequestStream(
            engine_id, request.request_id, on_output, len(prompt), sampling, self.tokenizer.text_stream
        )
        engine_request = EngineRequest(
            engine_id, prompt, sampling, request.priority, request.timeout_s, request.cache_salt
        )
        with self._lock:
            if self._closing.is_set():
                raise ServerError("the engine was shut down")
            if not self._is_ready:
                raise CapacityError("the engine died and is being restarted: send the request again later")
            if request.request_id in self._engine_ids:
                raise RequestError(f"request id {request.request_id!r} is in use: give each request its own")
            self._engine_ids[request.request_id] = engine_id
            self._streams[engine_id] = stream
            self._send(Add(engine_request))

    def close(self) -> None:
        """Stop the engine; requests in flight fail. Not to be called from `on_output`. Idempotent."""
        with self._lock:
            self._closing.set()
            engine = self._engine
            if engine is not None:
                engine.request_stop()
        if engine is not None:
            engine.wait_until_gone()
        if self._reader.ident is not None:
            self._reader.join()

    def _encode(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        limit = self.manifest.limits.max_model_len - 1  # one token at least is generated
        if isinstance(prompt, str):
            max_chars = self.tokenizer.max_text_chars(limit)
            if len(prompt) > max_chars:
                raise RequestError(
                    f"the prompt has {len(prompt)} characters, more than {max_chars}: that is above the "
                    f"limit of {limit} tokens however it is tokenized"
                )
            prompt = self.tokenizer.encode(prompt) if prompt else ()
        if not prompt:
            raise RequestError("the prompt is empty: it has to have at least one token")
        if len(prompt) > limit:
            raise RequestError(f"the prompt has {len(prompt)} tokens: at most {limit} are allowed")
        vocab_size = self.manifest.model.vocab_size
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"the prompt has token id {token_id}: allowed are 0 to {vocab_size - 1}")
        return prompt

    def _send(self, message: Add | Cancel) -> None:
        if self._engine is not None and self._is_ready:
            # If the engine has just died: the reader thread sees the same and fails all requests.
            with contextlib.suppress(OSError):
                self._engine.channel.send(message)

    def _start_engine(self) -> EngineHandle:
        with self._lock:
            if self._closing.is_set():
                raise ServerError("the engine was shut down")
            engine = self._engine = EngineHandle(self._model_dir, self._options, lambda: bool(self._streams))
        self._note_stats(engine.wait_until_ready())
        self._is_ready = True
        return engine

    def _note_stats(self, stats: EngineStats) -> None:
        self._stats = stats
        if self._on_step is not None:
            self._on_step(stats)

    # ----------------------------------------------------------------------- the reader thread

    def _run(self) -> None:
        engine = self._engine
        while engine is not None:
            try:
                self._read(engine)
            except Exception:
                # Better an engine started again than a thread that nobody misses and requests that hang.
                logger.exception("what the engine sent could not be handled: it is replaced")
            self._bury(engine)
            engine = self._restart()

    def _read(self, engine: EngineHandle) -> None:
        """Deliver outputs until the engine is gone."""
        while True:
            try:
                message = engine.receive()
            except (EOFError, OSError):
                return
            if isinstance(message, Outputs):
                self._note_stats(message.stats)
                for output in message.outputs:
                    self._deliver(output)
            elif isinstance(message, Refused):
                self._fail(self._streams[message.request_id], message.error, message.error_kind)

    def _deliver(self, output: EngineOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # what the engine had produced before it learned that the request had ended
        result = stream.advance(output)
        if result is None:
            return  # likewise of one of its answers
        if result.finish_reason is not None:
            # Ended by a stop string: the engine does not know yet.
            is_news = output.finish_reason is None
            if result.is_final:
                self._forget(stream, cancel=is_news)
            elif is_news:
                with self._lock:
                    self._send(Cancel(stream.engine_id, result.index))
        self._call(stream, result)

    def _call(self, stream: RequestStream, output: GenerationOutput) -> None:
        try:
            stream.on_output(output)
        except Exception:
            # The caller's trouble, of whatever kind, must not reach the other streams of this thread.
            logger.exception("request %s ends: its output could not be handed over", stream.request_id)
            if not output.is_final:
                self._forget(stream, cancel=True)

    def _forget(self, stream: RequestStream, *, cancel: bool) -> None:
        with self._lock:
            del self._streams[stream.engine_id], self._engine_ids[stream.request_id]
            if cancel:
                self._send(Cancel(stream.engine_id))

    def _fail(self, stream: RequestStream, error: str, error_kind: ErrorKind) -> None:
        self._forget(stream, cancel=False)
        self._call(stream, stream.failure("error", error, error_kind))

    def _bury(self, engine: EngineHandle) -> None:
        """Take leave of an engine that is gone: its requests fail, new ones are refused."""
        with self._lock:
            self._is_ready = False
            streams = list(self._streams.values())
        status = engine.reap()
        if engine.was_cut_off:
            self._closing.set()
        error_kind: ErrorKind = "server"
        if self._closing.is_set():
            error, error_kind = "the engine was shut down before the request had finished", "capacity"
        else:
            logger.error("the engine process died (%s) with %d requests", status, len(streams))
            error = f"the engine process died ({status}) while it served this request; it is being restarted"
        for stream in streams:
            self._fail(stream, error, error_kind)

    def _restart(self) -> EngineHandle | None:
        """A new engine, however often it takes; None if the client is closed meanwhile."""
        for attempt in itertools.count():
            if self._closing.wait(RESTART_DELAYS_S[min(attempt, len(RESTART_DELAYS_S) - 1)]):
                break
            try:
                engine = self._start_engine()
                self._num_restarts += 1
                return engine
            except TrtforgeError as error:
                logger.error("the engine could not be restarted, attempt %d: %s", attempt + 1, error)
        return None

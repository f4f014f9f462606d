"""An engine that says what a test tells it to, in place of the engine process behind an EngineClient."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from trtforge.engine_options import EngineOptions
from trtforge.runtime.engine import client as engine_client
from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.engine.messages import Add, Cancel, FromEngine, Outputs, ToEngine
from trtforge.runtime.outputs import EngineOutput, EngineStats, GenerationOutput
from trtforge.runtime.request import EngineRequest, GenerationRequest

TIMEOUT_S = 30


class ScriptedEngine:
    """Both the handle of an engine and the channel to it."""

    was_cut_off = False

    def __init__(self, *_: object) -> None:
        self.channel = self
        self.sent: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()  # by the client
        self._to_client: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()

    def next_request(self) -> EngineRequest:
        """The next one, past cancellations."""
        while not isinstance(message := self.sent.get(timeout=TIMEOUT_S), Add):
            pass
        return message.request

    def next_cancel(self) -> Cancel:
        message = self.sent.get(timeout=TIMEOUT_S)
        assert isinstance(message, Cancel)
        return message

    def say(self, *outputs: EngineOutput) -> None:
        self._to_client.put(Outputs(list(outputs), EngineStats()))

    # What the client calls.

    def wait_until_ready(self) -> EngineStats:
        return EngineStats()

    def send(self, message: ToEngine) -> None:
        self.sent.put(message)

    def receive(self) -> FromEngine:
        message = self._to_client.get()
        if message is None:
            raise EOFError
        return message

    def request_stop(self) -> None:
        self._to_client.put(None)

    def wait_until_gone(self) -> str:
        return "exit status 0"

    def reap(self) -> str:
        return "exit status 0"


class Scripted:
    """An engine client and the engine behind it."""

    def __init__(self, repository: Path, options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = ScriptedEngine()
        monkeypatch.setattr(engine_client, "EngineHandle", lambda *_: self.engine)
        self.client = EngineClient(repository / "llm" / "1", options)
        self.client.start()
        self._outputs: queue.SimpleQueue[GenerationOutput] = queue.SimpleQueue()

    def submit(self, request: GenerationRequest) -> EngineRequest:
        """Returns what the engine got."""
        self.start(request)
        return self.engine.next_request()

    def exchange(self, outputs: Sequence[EngineOutput], num_results: int) -> list[GenerationOutput]:
        """What the caller gets when the engine has said this."""
        self.engine.say(*outputs)
        return [self.next_output() for _ in range(num_results)]

    def next_output(self) -> GenerationOutput:
        return self._outputs.get(timeout=TIMEOUT_S)

    def start(self, request: GenerationRequest) -> None:
        """Submit without looking at what the engine gets."""
        self.client.submit(request, self._outputs.put)

    def has_more(self) -> bool:
        return not self._outputs.empty()


@pytest.fixture
def scripted(fake_repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    """A client with a timeout of 7 s for requests that name none."""
    scripted = Scripted(fake_repository, EngineOptions(default_timeout_s=7.0), monkeypatch)
    yield scripted
    scripted.client.close()

"""The requests that the engine core works on: their answers, their deadlines, and how they end."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from trtforge.runtime.outputs import EngineOutput, RequestStart
from trtforge.runtime.scheduling.sequence import Sequence


@dataclass(slots=True)
class OpenRequest:
    """One request; `answers` are those that have not ended, followers included."""

    request_id: str
    answers: list[Sequence]
    arrival_s: float
    timeout_s: float  # 0: none
    queue_s: float = 0.0  # until it was scheduled for the first time
    is_scheduled: bool = False


class OpenRequests:
    """All requests from their arrival until their last output has been given out."""

    def __init__(self) -> None:
        self._requests: dict[str, OpenRequest] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; ids of ended requests stay until theirs comes
        self._last_outputs: list[EngineOutput] = []  # of requests that ended between steps

    def __len__(self) -> int:
        return len(self._requests)

    def __bool__(self) -> bool:
        return bool(self._requests or self._last_outputs)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests or any(
            output.request_id == request_id for output in self._last_outputs
        )

    def add(self, request: OpenRequest) -> None:
        """A new request, whose id is not in use."""
        self._requests[request.request_id] = request
        if request.timeout_s > 0:
            heapq.heappush(self._deadlines, (request.arrival_s + request.timeout_s, request.request_id))

    def values(self) -> Iterable[OpenRequest]:
        """Requests that have not ended."""
        return self._requests.values()

    def get(self, request_id: str) -> OpenRequest | None:
        """The request, unless it has ended."""
        return self._requests.get(request_id)

    def note_scheduled(self, request_id: str, now_s: float) -> None:
        """One of its answers is scheduled."""
        request = self._requests[request_id]
        if not request.is_scheduled:
            request.is_scheduled = True
            request.queue_s = now_s - request.arrival_s

    def start(self, request_id: str) -> RequestStart:
        """How an open request came to its first token."""
        request = self._requests[request_id]
        return RequestStart(request.queue_s, request.answers[0].num_hit_tokens)

    def end_answer(self, sequence: Sequence) -> None:
        """The answer has had its last output; with the last one the request ends."""
        request = self._requests[sequence.request_id]
        request.answers.remove(sequence)
        if not request.answers:
            del self._requests[sequence.request_id]

    def end(self, request_id: str) -> None:
        """The request ends as a whole."""
        del self._requests[request_id]

    def end_between_steps(self, output: EngineOutput) -> None:
        """The request ends as a whole; `take_last_outputs` gives `output`."""
        self.end(output.request_id)
        self._last_outputs.append(output)

    def take_last_outputs(self) -> list[EngineOutput]:
        """Outputs of the requests that have ended between steps."""
        outputs, self._last_outputs = self._last_outputs, []
        return outputs

    def expired(self, now_s: float) -> list[OpenRequest]:
        """Requests whose time is over."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            # Not another request that came later under the same id.
            if request is not None and request.arrival_s + request.timeout_s == deadline_s:
                expired.append(request)
        return expired

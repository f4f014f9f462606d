"""The blocking client of a served model, over gRPC streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from trtforge.client import answers, protocol
from trtforge.client.answers import Arrivals, Chunk, Completion
from trtforge.client.protocol import (
    DEFAULT_OPTIONS,
    SERVER_DEFAULTS,
    Prompt,
    RequestOptions,
    SamplingOptions,
)

__all__ = ["Chunk", "Client", "Completion", "CompletionStream", "RequestOptions", "SamplingOptions"]


class CompletionStream(Iterator[Chunk]):
    """The chunks of a request's answers as they come.

    Leaving the `with` block or `close` cancels the request. `close` may be called by any
    thread; whoever waits for the next chunk then sees the end.
    """

    def __init__(self, call: grpc.Call, client: Client, arrivals: Arrivals) -> None:
        self._call = call
        self._client = client
        self._arrivals = arrivals
        self._closed = False

    def __next__(self) -> Chunk:
        try:
            while not self._closed:
                chunk = self._arrivals.pop()
                if chunk is not None:
                    return chunk
                response = self._read()
                if response is None:
                    break
                self._arrivals.add(response)
        except BaseException:
            self.close()
            raise
        if not self._arrivals.finished and not self._closed:
            raise answers.unfinished()
        raise StopIteration

    def _read(self) -> service_pb2.ModelStreamInferResponse | None:
        try:
            return None if self._closed else next(self._call, None)
        except grpc.RpcError as error:
            if self._arrivals.finished or self._closed:
                return None
            raise answers.rpc_error(error, self._client.url) from error

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the request on the server if it has not finished; idempotent."""
        self._closed = True
        # A finished one ends by itself. Cancelling just then crashes Triton 2.51 now and then.
        if not self._arrivals.finished:
            self._call.cancel()

    def __del__(self) -> None:
        self.close()


class Client:
    """A connection to one model of a tritonserver. Threads may share it; each request is independent.

    Requests raise RequestError if they are wrong in themselves, CapacityError if the model has no room
    now, RequestTimeoutError if they took longer than they were allowed to, and ServerError if there is no
    server at `url`, or if it failed.
    """

    def __init__(self, url: str = "localhost:8001", model: str = "llm") -> None:
        self.url = url
        self.model = model
        self._channel = grpc.insecure_channel(url, options=protocol.CHANNEL_OPTIONS)
        # tritonclient's own client has one stream, on which all requests interleave and which is
        # cancelled as a whole. One call of its stub per request, on the shared connection, has its own
        # status, deadline and cancellation: nothing to dispatch. With its only request sent, the
        # server ends the call after the response with the final flag: nothing to look for.
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, which cancels the requests in flight; idempotent."""
        self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        input_ids: Sequence[int] | None = None,
        sampling: SamplingOptions = SERVER_DEFAULTS,
        options: RequestOptions = DEFAULT_OPTIONS,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Completion:
        """The whole answer to a prompt, to a conversation's `messages` or to token ids.

        With n > 1 it has the other answers with it.
        """
        source = Prompt(prompt, messages, input_ids)
        request = protocol.infer_request(
            self.model, source, sampling, options, stream=False, request_id=request_id
        )
        with self._start(request, Arrivals(sampling.n or 1), timeout_s) as stream:
            return answers.join(list(stream))

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        input_ids: Sequence[int] | None = None,
        sampling: SamplingOptions = SERVER_DEFAULTS,
        options: RequestOptions = DEFAULT_OPTIONS,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> CompletionStream:
        """The answer chunk by chunk, those of n answers mixed; the request is sent at once.

        Dropping the iterator before its end, or closing it, cancels the request on the server.
        """
        source = Prompt(prompt, messages, input_ids)
        request = protocol.infer_request(
            self.model, source, sampling, options, stream=True, request_id=request_id
        )
        return self._start(request, Arrivals(sampling.n or 1), timeout_s)

    def _start(
        self, request: service_pb2.ModelInferRequest, arrivals: Arrivals, timeout_s: float | None
    ) -> CompletionStream:
        call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout_s)
        return CompletionStream(call, self, arrivals)

"""The asyncio client of a served model, over gRPC streaming: the blocking client's counterpart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
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
from trtforge.errors import ServerError

__all__ = ["AsyncClient", "AsyncCompletionStream", "Chunk", "Completion", "RequestOptions", "SamplingOptions"]


class AsyncCompletionStream(AsyncIterator[Chunk]):
    """The chunks of a request's answers as they come.

    Leaving the `async with` block, `close`, or cancelling the task that waits for the next chunk
    cancels the request on the server.
    """

    def __init__(self, call: grpc.aio.StreamStreamCall, client: AsyncClient, arrivals: Arrivals) -> None:
        self._call = call
        self._client = client
        self._arrivals = arrivals
        self._closed = False

    async def __anext__(self) -> Chunk:
        try:
            while not self._closed:
                chunk = self._arrivals.pop()
                if chunk is not None:
                    return chunk
                response = await self._read()
                if response is None:
                    break
                self._arrivals.add(response)
        except BaseException:
            self.close()
            raise
        if not self._arrivals.finished and not self._closed:
            raise answers.unfinished()
        raise StopAsyncIteration

    async def _read(self) -> service_pb2.ModelStreamInferResponse | None:
        if self._closed:
            return None
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            if self._arrivals.finished or self._closed:
                return None
            raise answers.rpc_error(error, self._client.url) from error
        except asyncio.CancelledError as error:
            # gRPC raises it for a call that was cancelled on this side, whether or not the task was.
            if self._closed:
                return None
            if self._client.is_closed:
                raise ServerError(f"the client of {self._client.url} was closed") from error
            raise
        return None if response is grpc.aio.EOF else response

    async def __aenter__(self) -> AsyncCompletionStream:
        return self

    async def __aexit__(
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


class AsyncClient:
    """A connection to one model of a tritonserver, to be made inside the event loop that uses it.

    Any number of tasks may share it. Requests raise what those of the blocking `Client` raise.
    """

    def __init__(self, url: str = "localhost:8001", model: str = "llm") -> None:
        self.url = url
        self.model = model
        self.is_closed = False
        self._channel = grpc.aio.insecure_channel(url, options=protocol.CHANNEL_OPTIONS)
        # One call per request, for the reasons given in the blocking client.
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection, which cancels the requests in flight; idempotent."""
        self.is_closed = True
        await self._channel.close()

    async def generate(
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
        async with self._start(request, Arrivals(sampling.n or 1), timeout_s) as stream:
            return answers.join([chunk async for chunk in stream])

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
    ) -> AsyncCompletionStream:
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
    ) -> AsyncCompletionStream:
        call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout_s)
        return AsyncCompletionStream(call, self, arrivals)

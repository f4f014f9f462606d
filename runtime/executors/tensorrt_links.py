"""What a stage's engine has of the stages before and after its own: hidden states, through host memory."""

from __future__ import annotations

from collections.abc import Mapping

from trtforge import wire
from trtforge.manifest import DType, element_bytes
from trtforge.runtime.executors.device_memory import DeviceStream
from trtforge.runtime.executors.step_buffers import Shapes
from trtforge.runtime.executors.tensorrt_engine import Engine
from trtforge.runtime.parallel.communicator import Communicator


class _HiddenStates:
    """[T, size] of the largest step, in device memory and in pinned host memory."""

    def __init__(
        self, name: str, engine: Engine, dtype: DType, num_tokens: int, stream: DeviceStream
    ) -> None:
        self.size = engine.row_size(name)
        self.num_bytes = num_tokens * self.size * element_bytes(dtype)
        self.address = stream.allocate(self.num_bytes, name)
        # Bytes, since numpy has no bfloat16.
        self.host = stream.allocate_pinned(self.num_bytes, name).reshape(num_tokens, -1)
        self.host[:] = 0  # decode steps are tried before anything is received


class StageLinks:
    """The other stages of a rank, if there are any.

    A step is `receive`, `copy_in`, the engine, `copy_out`, and, once the stream has done all that, `send`.
    The copies are work for the stream at addresses that stay, and may be captured; `receive` and `send` wait
    for other ranks, on the host.
    """

    def __init__(
        self,
        communicator: Communicator | None,
        engine: Engine,
        dtype: DType,
        num_tokens: int,
        stream: DeviceStream,
    ) -> None:
        """Buffers for steps of `num_tokens` at most, with hidden states of `dtype`. A model's only rank has
        no communicator. Raises CapacityError if there is no memory for them."""
        self._communicator = communicator
        self._stream = stream
        self._received: _HiddenStates | None = None
        self._computed: _HiddenStates | None = None
        if communicator is not None and not communicator.is_first:
            self._received = _HiddenStates(wire.HIDDEN_STATES, engine, dtype, num_tokens, stream)
        if communicator is not None and not communicator.is_last:
            self._computed = _HiddenStates(wire.HIDDEN_STATES_OUT, engine, dtype, num_tokens, stream)

    @property
    def num_bytes(self) -> int:
        """Device memory that is used."""
        return sum(buffer.num_bytes for buffer in (self._received, self._computed) if buffer is not None)

    @property
    def addresses(self) -> Mapping[str, int]:
        """Where the engine is to read and to write."""
        buffers = {wire.HIDDEN_STATES: self._received, wire.HIDDEN_STATES_OUT: self._computed}
        return {name: buffer.address for name, buffer in buffers.items() if buffer is not None}

    def input_shapes(self, num_tokens: int) -> Shapes:
        """Those that the engine is told for a step."""
        return {} if self._received is None else {wire.HIDDEN_STATES: (num_tokens, self._received.size)}

    def receive(self, num_tokens: int, num_padded: int) -> None:
        """Wait for the hidden states of a step that is padded to `num_padded` tokens. Earlier work has to be
        done.

        Those of padding are zeros: numbers that a step before has left there may be none that a router or an
        operator over several rows can do with.
        """
        if self._communicator is not None and self._received is not None:
            self._communicator.receive(self._received.host[:num_tokens])
            self._received.host[num_tokens:num_padded] = 0

    def copy_in(self, num_tokens: int) -> None:
        """To the device, padding included."""
        if self._received is not None:
            self._stream.copy_in(self._received.address, self._received.host[:num_tokens])

    def copy_out(self, num_tokens: int) -> None:
        """From the device."""
        if self._computed is not None:
            self._stream.copy_out(self._computed.host[:num_tokens], self._computed.address)

    def send(self, num_tokens: int) -> None:
        """Hand on what the stream has copied, without padding."""
        if self._communicator is not None and self._computed is not None:
            self._communicator.send(self._computed.host[:num_tokens])

"""How a step comes to the ranks and its logits come back: through memory of one machine, or in messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from trtforge import wire
from trtforge.manifest import Manifest
from trtforge.runtime.executor import Float32Array, ModelInputs
from trtforge.runtime.parallel.messages import Done, FromRank, Step
from trtforge.runtime.parallel.step_memory import StepMemory, StepSizes


class StepSender(Protocol):
    """The driver's side."""

    def write(self, inputs: ModelInputs) -> Step:
        """What all ranks are told. Raises ValueError for a larger step than the model's limits allow."""
        ...

    def logits(self, step: Step, answers: Sequence[FromRank]) -> Float32Array:
        """[R, vocab_size], of the step that all ranks have answered."""
        ...


class StepReceiver(Protocol):
    """A rank's side."""

    def read(self, step: Step) -> ModelInputs:
        """The step."""
        ...

    def logits(self, num_rows: int) -> Float32Array:
        """[num_rows, columns of this rank]: where its logits are to be written."""
        ...

    def answer(self, logits: Float32Array) -> Done:
        """What the driver is told when they are there."""
        ...


class MemorySender:
    """Messages have the sizes alone."""

    def __init__(self, memory: StepMemory) -> None:
        self._memory = memory

    def write(self, inputs: ModelInputs) -> Step:
        """Puts the arrays into memory."""
        return Step(self._memory.write(inputs))

    def logits(self, step: Step, answers: Sequence[FromRank]) -> Float32Array:
        """In place."""
        return self._memory.logits(step.sizes.R)


class MemoryReceiver:
    """The other side of MemorySender."""

    def __init__(self, memory: StepMemory, logits_columns: tuple[int, int]) -> None:
        self._memory = memory
        self._columns = slice(*logits_columns)

    def read(self, step: Step) -> ModelInputs:
        """In place."""
        return self._memory.read(step.sizes)

    def logits(self, num_rows: int) -> Float32Array:
        """The rank's columns of what the driver reads."""
        return self._memory.logits(num_rows)[:, self._columns]

    def answer(self, logits: Float32Array) -> Done:
        """That they are there."""
        return Done()


class MessageSender:
    """Arrays follow each other in a message, in the order of `trtforge.wire.GRAPH_INPUTS`."""

    def __init__(self, manifest: Manifest) -> None:
        self._largest = StepSizes.largest(manifest)
        self._columns = [rank.logits_columns for rank in manifest.ranks]
        self._vocab_size = manifest.model.vocab_size

    def write(self, inputs: ModelInputs) -> Step:
        """All arrays, int32."""
        sizes = StepSizes.of(inputs)
        sizes.check(self._largest)
        arrays = [getattr(inputs, tensor.name) for tensor in wire.GRAPH_INPUTS]
        return Step(sizes, b"".join(np.ascontiguousarray(array, np.int32).tobytes() for array in arrays))

    def logits(self, step: Step, answers: Sequence[FromRank]) -> Float32Array:
        """Put together of the ranks' parts."""
        logits = np.empty((step.sizes.R, self._vocab_size), np.float32)
        for (start, stop), answer in zip(self._columns, answers, strict=True):
            if isinstance(answer, Done) and start < stop:
                logits[:, start:stop] = np.frombuffer(answer.logits, np.float32).reshape(-1, stop - start)
        return logits


class MessageReceiver:
    """The other side of MessageSender."""

    def __init__(self, logits_columns: tuple[int, int]) -> None:
        start, stop = logits_columns
        self._num_columns = stop - start

    def read(self, step: Step) -> ModelInputs:
        """In a copy of the message's bytes, since runtimes want arrays that can be written to."""
        data = bytearray(step.arrays)
        arrays, offset = {}, 0
        for tensor in wire.GRAPH_INPUTS:
            shape = step.sizes.shape(tensor)
            size = math.prod(shape)
            array = np.frombuffer(data, np.int32, size, offset)
            arrays[tensor.name] = array.reshape(shape)
            offset += array.nbytes
        return ModelInputs(**arrays)

    def logits(self, num_rows: int) -> Float32Array:
        """New ones."""
        return np.empty((num_rows, self._num_columns), np.float32)

    def answer(self, logits: Float32Array) -> Done:
        """With the logits."""
        return Done(logits.tobytes())

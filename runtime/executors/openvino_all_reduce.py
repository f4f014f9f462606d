"""AllReduce nodes in OpenVINO: an operator in Python, which the CPU plugin calls in the middle of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openvino as ov

from trtforge.runtime.parallel.communicator import Communicator


class RankSums:
    """The sums of one rank's steps.

    OpenVINO goes on, with whatever is in the output, when an operator raises. So errors are kept, and nothing
    is waited for any more in the rest of the step.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._error: Exception | None = None

    def add(self, source: Any, target: Any) -> None:
        """Write the sum of an array over the ranks to another one, unless an earlier one has failed."""
        if self._error is not None:
            return
        try:
            self._communicator.all_reduce(source, target)
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise what has happened in the step that is over."""
        if self._error is not None:
            raise self._error

    def converter(self) -> Callable[[Any], list[Any]]:
        """Converts nodes of a graph."""
        return lambda context: [_AllReduce([context.get_input(0)], self).output(0)]


class _AllReduce(ov.Op):  # type: ignore[misc]
    """OpenVINO copies it for every step, to ask the copy for the output's shape."""

    def __init__(self, inputs: list[Any], sums: RankSums) -> None:
        super().__init__(self, inputs)
        self._sums = sums

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, new_inputs: list[Any]) -> _AllReduce:
        return _AllReduce(new_inputs, self._sums)

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        if outputs[0].shape != inputs[0].shape:  # setting it takes as long as all the rest
            outputs[0].shape = inputs[0].shape
        self._sums.add(inputs[0].data, outputs[0].data)
        return True

"""Where an engine's steps find their inputs: at fixed addresses, for the largest step that there can be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from trtforge import wire
from trtforge.manifest import Profile
from trtforge.runtime.executor import Int32Array
from trtforge.runtime.executors.device_memory import ALIGNMENT, DeviceStream

Shapes = Mapping[str, tuple[int, ...]]  # by the names of the graph's inputs


def shapes_of(arrays: Mapping[str, Int32Array]) -> dict[str, tuple[int, ...]]:
    """The shapes of a step's arrays."""
    return {name: array.shape for name, array in arrays.items()}


def profile_for(profiles: Sequence[Profile], shapes: Shapes) -> int:
    """The first profile that has room for a step. Raises ValueError if none has."""
    sizes = {
        dim: size
        for tensor in wire.GRAPH_INPUTS
        for dim, size in zip(tensor.dims, shapes[tensor.name], strict=True)
        if isinstance(dim, str)
    }
    for index, profile in enumerate(profiles):
        if all(profile.dims[dim].min <= size <= profile.dims[dim].max for dim, size in sizes.items()):
            return index
    ranges = {profile.name: {dim: profile.dims[dim].max for dim in sizes} for profile in profiles}
    raise ValueError(f"the engine was built for steps of at most {ranges}, and this one has {sizes}")


class StepBuffers:
    """The arrays of a step in pinned host memory and in device memory, laid out alike."""

    def __init__(
        self, profiles: Sequence[Profile], stream: DeviceStream, on_host: Collection[str] = ()
    ) -> None:
        """As large as the largest profile. The arrays named in `on_host` are to be read in host memory."""
        self._stream = stream
        offsets: dict[str, int] = {}
        ends: dict[str, int] = {}
        num_bytes = 0
        for tensor in wire.GRAPH_INPUTS:
            offsets[tensor.name] = num_bytes
            ends[tensor.name] = num_bytes + 4 * max(_num_elements(tensor, profile) for profile in profiles)
            num_bytes = -(-ends[tensor.name] // ALIGNMENT) * ALIGNMENT
        self.num_bytes = num_bytes
        host = stream.allocate_pinned(num_bytes, "the inputs of a step")
        self._host = {name: host[offset : ends[name]].view(np.int32) for name, offset in offsets.items()}
        address = stream.allocate(num_bytes, "the inputs of a step")
        self._device = {name: address + offset for name, offset in offsets.items() if name not in on_host}
        # Where the engine is to read them.
        self.addresses: Mapping[str, int] = {
            **self._device,
            **{name: self._host[name].ctypes.data for name in on_host},
        }

    def stage(self, arrays: Mapping[str, Int32Array]) -> None:
        """Put a step's arrays into the pinned memory. Earlier work has to be done."""
        for name, array in arrays.items():
            self._host[name][: array.size] = array.ravel()

    def send(self, shapes: Shapes) -> None:
        """Copy what is staged, arrays of these shapes, to the device."""
        for name, address in self._device.items():
            self._stream.copy_in(address, self._host[name][: math.prod(shapes[name])])


def _num_elements(tensor: wire.GraphTensor, profile: Profile) -> int:
    return math.prod(dim if isinstance(dim, int) else profile.dims[dim].max for dim in tensor.dims)

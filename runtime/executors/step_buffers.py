"""Where an engine's steps find their arrays and leave their logits: at fixed addresses, for the largest step
that there can be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from trtforge import wire
from trtforge.manifest import Profile
from trtforge.runtime.executor import Float32Array, Int32Array
from trtforge.runtime.executors.device_memory import ALIGNMENT, DeviceStream

Shapes = Mapping[str, tuple[int, ...]]  # by the names of the graph's inputs


def shapes_of(arrays: Mapping[str, Int32Array]) -> dict[str, tuple[int, ...]]:
    """The shapes of a step's arrays."""
    return {name: array.shape for name, array in arrays.items()}


def profile_for(profiles: Sequence[Profile], shapes: Shapes) -> int:
    """The first profile that has room for a step with arrays of these shapes. Raises ValueError if none
    has."""
    sizes = {
        dim: size
        for tensor in wire.GRAPH_INPUTS
        if tensor.name in shapes
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
        self,
        names: Collection[str],
        profiles: Sequence[Profile],
        stream: DeviceStream,
        on_host: Collection[str] = (),
    ) -> None:
        """Those that are named, as large as the largest profile. The arrays in `on_host` are to be read in
        host memory."""
        self._stream = stream
        offsets: dict[str, int] = {}
        ends: dict[str, int] = {}
        num_bytes = 0
        for tensor in (tensor for tensor in wire.GRAPH_INPUTS if tensor.name in names):
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
        """Put arrays of a step into the pinned memory. Earlier work has to be done."""
        for name, array in arrays.items():
            self._host[name][: array.size] = array.ravel()

    def send(self, shapes: Shapes) -> None:
        """Copy what is staged, arrays of these shapes, to the device."""
        for name, address in self._device.items():
            self._stream.copy_in(address, self._host[name][: math.prod(shapes[name])])


class LogitsBuffer:
    """The logits of a step in device memory, and in pinned host memory as many as most steps have."""

    def __init__(self, num_columns: int, num_rows: int, num_pinned_rows: int, stream: DeviceStream) -> None:
        """Without columns, as in stages that compute no logits, there is no memory."""
        self._stream = stream
        self.num_bytes = 4 * num_columns * num_rows
        # Where the engine is to write them.
        self.addresses: Mapping[str, int] = {}
        self._pinned: Float32Array = np.empty((num_pinned_rows, 0), np.float32)
        if num_columns:
            self.addresses = {wire.LOGITS: stream.allocate(self.num_bytes, "the logits of a step")}
            pinned = stream.allocate_pinned(4 * num_columns * num_pinned_rows, "the logits of a step")
            self._pinned = pinned.view(np.float32).reshape(num_pinned_rows, num_columns)

    def rows(self, num_rows: int) -> Float32Array:
        """Room for that many rows in host memory, [num_rows, num_columns]; valid until the next step."""
        if num_rows <= len(self._pinned):
            return self._pinned[:num_rows]
        return np.empty((num_rows, self._pinned.shape[1]), np.float32)

    def copy_out(self, logits: Float32Array) -> None:
        """Copy the first rows from the device, if there are columns."""
        for address in self.addresses.values():
            self._stream.copy_out(logits, address)


def _num_elements(tensor: wire.GraphTensor, profile: Profile) -> int:
    return math.prod(dim if isinstance(dim, int) else profile.dims[dim].max for dim in tensor.dims)

"""Memory of an NVIDIA GPU, and one stream of work on it, through the CUDA driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from trtforge.errors import CapacityError, DeviceError, TrtforgeError
from trtforge.plugins.cuda_driver import Device, check

ByteArray = npt.NDArray[np.uint8]

# A block of memory may hold several tensors: they begin at multiples of this many bytes.
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class CapturedWork:
    """Work that a stream can be given again and again, at the same addresses."""

    graph: Any  # the driver's executable graph


class DeviceStream:
    """A stream, and the memory that its work uses, until `close`.

    Work is done in the order in which it was given, and is not waited for but by `synchronize`. What the
    driver reports, at once or about earlier work, is a DeviceError.
    """

    def __init__(self, device: Device) -> None:
        """Makes the device the current one of this thread; see `make_current` for others."""
        self._device = device
        self.make_current()
        self._pointers: list[Any] = []
        self._pinned_pointers: list[int] = []
        self._captured: list[CapturedWork] = []
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = _check(driver.cuStreamCreate(flags), "creating a stream")

    @property
    def handle(self) -> int:
        """As other libraries take it."""
        return int(self._stream)

    def make_current(self) -> None:
        """Every thread has to do this once before it calls other methods, or another device's owner may
        have been there since."""
        _check(driver.cuCtxSetCurrent(self._device.context), "making the device's context current")

    def free_bytes(self) -> int:
        """Memory of the device that is free."""
        result = driver.cuMemGetInfo()
        _check(result, "asking for free memory")
        return int(result[1])

    def allocate(self, num_bytes: int, what: str) -> int:
        """The address of zeroed device memory. Raises CapacityError if there is no such room."""
        num_bytes = max(num_bytes, 1)
        result = driver.cuMemAlloc(num_bytes)
        pointer = _check_memory(result, f"{what}: allocating {num_bytes:,} bytes of GPU memory")
        self._pointers.append(pointer)
        _check(driver.cuMemsetD8Async(pointer, 0, num_bytes, self._stream), f"zeroing {what}")
        return int(pointer)

    def allocate_pinned(self, num_bytes: int, what: str) -> ByteArray:
        """Host memory that the device copies from and to by itself; valid until `close`. Raises CapacityError
        if there is no such room."""
        result = driver.cuMemHostAlloc(max(num_bytes, 1), 0)
        pointer = int(_check_memory(result, f"{what}: allocating {num_bytes:,} bytes of pinned memory"))
        self._pinned_pointers.append(pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(pointer))

    def copy_in(self, target: int, source: npt.NDArray[Any]) -> None:
        """From host memory, which must not change before the work is done."""
        result = driver.cuMemcpyHtoDAsync(target, source.ctypes.data, source.nbytes, self._stream)
        _check(result, f"copying {source.nbytes} bytes to the GPU")

    def copy_out(self, target: npt.NDArray[Any], source: int) -> None:
        """To host memory, all of `target`."""
        result = driver.cuMemcpyDtoHAsync(target.ctypes.data, source, target.nbytes, self._stream)
        _check(result, f"copying {target.nbytes} bytes from the GPU")

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Within the device's memory."""
        result = driver.cuMemcpyDtoDAsync(target, source, num_bytes, self._stream)
        _check(result, f"copying {num_bytes} bytes on the GPU")

    def synchronize(self) -> None:
        """Wait for all work."""
        _check(driver.cuStreamSynchronize(self._stream), "the GPU's work")

    def capture(self, work: Callable[[], None]) -> CapturedWork:
        """What `work` gives this stream, which is not done now."""
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _check(driver.cuStreamBeginCapture(self._stream, mode), "beginning a CUDA graph")
        try:
            work()
        finally:
            result = driver.cuStreamEndCapture(self._stream)
        graph = _check(result, "ending a CUDA graph")
        captured = CapturedWork(_check(driver.cuGraphInstantiate(graph, 0), "making a CUDA graph executable"))
        self._captured.append(captured)
        _check(driver.cuGraphDestroy(graph), "freeing a CUDA graph")
        return captured

    def launch(self, captured: CapturedWork) -> None:
        """Do captured work."""
        _check(driver.cuGraphLaunch(captured.graph, self._stream), "launching a CUDA graph")

    def close(self) -> None:
        """Wait for all work, and free the memory and the stream."""
        self.synchronize()
        for captured in self._captured:
            _check(driver.cuGraphExecDestroy(captured.graph), "freeing a CUDA graph")
        for pointer in self._pointers:
            _check(driver.cuMemFree(pointer), "freeing GPU memory")
        for address in self._pinned_pointers:
            _check(driver.cuMemFreeHost(address), "freeing pinned memory")
        self._captured, self._pointers, self._pinned_pointers = [], [], []
        _check(driver.cuStreamDestroy(self._stream), "freeing a stream")


def _check(result: tuple[Any, ...], what: str, error: type[TrtforgeError] = DeviceError) -> Any:
    return check(result, what, error)


def _check_memory(result: tuple[Any, ...], what: str) -> Any:
    is_full = result[0] == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    return _check(result, what, CapacityError if is_full else DeviceError)

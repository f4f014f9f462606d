"""CUDA's driver API: one device in its primary context, and what its functions report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cuda.bindings import driver
from cuda.pathfinder import DynamicLibNotFoundError

from trtforge.errors import PluginError, TrtforgeError


def check(result: tuple[Any, ...], what: str, error: type[TrtforgeError] = PluginError) -> Any:
    """The value that a driver's function returned; raises `error` with the driver's reason."""
    status = result[0]
    if status != driver.CUresult.CUDA_SUCCESS:
        texts = [driver.cuGetErrorName(status)[1], driver.cuGetErrorString(status)[1]]
        reason = ": ".join(text.decode() for text in texts if text) or f"CUDA error {int(status)}"
        raise error(f"{what} failed with {reason}")
    return result[1] if len(result) > 1 else None


class Device:
    """A device and its primary context, which CUDA's runtime and TensorRT use as well."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises PluginError if there is no driver or no such device."""
        try:
            check(driver.cuInit(0), "initializing the CUDA driver")
        except DynamicLibNotFoundError as error:
            raise PluginError("kernels need an NVIDIA driver: libcuda.so.1 was not found") from error
        handle = check(driver.cuDeviceGet(ordinal), f"finding CUDA device {ordinal}")
        self.context = check(driver.cuDevicePrimaryCtxRetain(handle), f"using CUDA device {ordinal}")

        def attribute(name: str) -> int:
            number = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            value: int = check(driver.cuDeviceGetAttribute(number, handle), f"asking for {name}")
            return value

        # 90 is 9.0
        self.compute_capability = 10 * attribute("COMPUTE_CAPABILITY_MAJOR") + attribute(
            "COMPUTE_CAPABILITY_MINOR"
        )
        self.num_sms = attribute("MULTIPROCESSOR_COUNT")

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let the calling thread work on this device for a while."""
        check(driver.cuCtxPushCurrent(self.context), "making the device's context current")
        try:
            yield
        finally:
            check(driver.cuCtxPopCurrent(), "making the context before current again")

"""Launches plans through the CUDA driver."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Mapping
from typing import Any

from cuda.bindings import driver

from trtforge.errors import PluginError
from trtforge.plugins.bundle import Bundle, CubinEntry, arch_for
from trtforge.plugins.cuda_driver import Device, check
from trtforge.plugins.launch import Gpu, Kernel, Launch, Plan, workspace_layout

POINTER_ALIGNMENT = 16  # bytes; kernels are compiled for pointers that are multiples of it
DEFAULT_SHARED_BYTES = 48 * 1024  # a block gets more only if its kernel was allowed to ask for more

# A parameter fills 8 bytes of the argument memory. Ints and floats are checked for their range by `struct`.
_SLOT_BYTES = 8
_POINTER_FORMAT = "Q"
_FORMATS = {"i32": "i4x", "u32": "I4x", "i64": "q", "u64": "Q", "fp32": "f4x"}


class Launcher:
    """Launches kernels on one device, in its primary context, which CUDA's runtime and TensorRT use as well.

    A kernel is loaded once and stays loaded until the process ends. Methods may be called from any thread.
    """

    def __init__(self, bundle: Bundle, device: int = 0) -> None:
        """`device` is the ordinal. Raises PluginError if there is no driver, no such device, or none that
        kernels are compiled for."""
        self._bundle = bundle
        self._lock = threading.Lock()  # of _kernels, and of the argument memory of every kernel in it
        self._kernels: dict[Kernel, _LoadedKernel] = {}
        self._device = Device(device)
        capability = self._device.compute_capability
        arch_for(capability)  # or there are no kernels for it, whatever the bundle
        self.gpu = Gpu(arch=capability, num_sms=self._device.num_sms)

    def load(self, plan: Plan) -> None:
        """Load the kernels of `plan` that are not loaded yet.

        Raises PluginError for a kernel that is not compiled for this device, or that it can't load.
        """
        with self._lock:
            for launch in plan.launches:
                self._load(launch.kernel)

    def launch(self, plan: Plan, pointers: Mapping[str, int], workspace_pointer: int, stream: int) -> None:
        """Put the launches of `plan` on `stream`, in order.

        `pointers` has the device address of every tensor by name; `workspace_pointer` is that of memory as
        large as `workspace_layout` says. The primary context has to be current, as it is after cudaSetDevice
        and in TensorRT. Nothing is allocated and nothing waited for, so that a stream can be captured into a
        graph, once the kernels are loaded. Raises PluginError for arguments that the kernels do not take, and
        for what the driver reports, which may be an error of earlier work on the device.
        """
        offsets, _ = workspace_layout(plan)
        addresses = {**pointers, **{name: workspace_pointer + offset for name, offset in offsets.items()}}
        with self._lock:
            for launch in plan.launches:
                if 0 not in launch.grid:
                    self._load(launch.kernel).launch(launch, addresses, stream)

    def _load(self, kernel: Kernel) -> _LoadedKernel:
        loaded = self._kernels.get(kernel)
        if loaded is None:
            entry, cubin = self._bundle.cubin(kernel, self.gpu.arch)
            with self._device.current():
                loaded = self._kernels[kernel] = _LoadedKernel(kernel, entry, cubin)
        return loaded


class _LoadedKernel:
    """A kernel in the current context, with memory in which its arguments are passed.

    The driver copies arguments while it is called, so that the memory serves every launch.
    """

    def __init__(self, kernel: Kernel, entry: CubinEntry, cubin: bytes) -> None:
        self._name = kernel.name
        self._parameters = kernel.parameters
        self._packing = struct.Struct("=" + "".join(_format(kernel, type_) for _, type_ in kernel.parameters))
        num_slots = len(kernel.parameters) + len(entry.hidden_parameters)
        self._arguments = ctypes.create_string_buffer(num_slots * _SLOT_BYTES)  # zeros: null pointers
        first = ctypes.addressof(self._arguments)
        self._slots = (ctypes.c_void_p * num_slots)(*(first + i * _SLOT_BYTES for i in range(num_slots)))

        module = check(driver.cuModuleLoadData(cubin), f"loading {self._name}")
        self._function = check(
            driver.cuModuleGetFunction(module, entry.symbol.encode()), f"finding {self._name}"
        )
        # The driver is lazy: it would load the function at its first launch, perhaps during a capture.
        check(driver.cuFuncLoad(self._function), f"loading {self._name}")
        if entry.shared_bytes > DEFAULT_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(
                driver.cuFuncSetAttribute(self._function, attribute, entry.shared_bytes),
                f"allowing {self._name} {entry.shared_bytes} bytes of shared memory",
            )
        self._num_ctas = entry.num_ctas
        self._config = _launch_config(entry)

    def launch(self, launch: Launch, addresses: Mapping[str, int], stream: int) -> None:
        values = [
            self._address(name, launch.arguments[name], addresses)
            if type_.startswith("*")
            else launch.arguments[name]
            for name, type_ in self._parameters
        ]
        try:
            self._packing.pack_into(self._arguments, 0, *values)
        except (struct.error, OverflowError) as error:
            given = {name: launch.arguments[name] for name, _ in self._parameters}
            raise PluginError(f"{self._name} takes {dict(self._parameters)}, not {given}: {error}") from error
        config = self._config
        config.gridDimX = launch.grid[0] * self._num_ctas
        config.gridDimY = launch.grid[1]
        config.gridDimZ = launch.grid[2]
        config.hStream = driver.CUstream(stream)
        check(
            driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(self._slots), 0),
            f"launching {self._name} over a grid of {launch.grid}",
        )

    def _address(self, parameter: str, name: Any, addresses: Mapping[str, int]) -> int:
        if name is None:
            return 0
        if name not in addresses:
            raise PluginError(f"{self._name}: {parameter} points to {name}, of which no address was given")
        address = addresses[name]
        if address % POINTER_ALIGNMENT:
            raise PluginError(
                f"{self._name}: {name} begins at address {address:#x}, which is not a multiple of "
                f"{POINTER_ALIGNMENT} bytes"
            )
        return address


def _format(kernel: Kernel, type_: str) -> str:
    if type_.startswith("*"):
        return _POINTER_FORMAT
    if type_ not in _FORMATS:
        raise PluginError(
            f"{kernel.name} has a parameter of type {type_}; there are pointers and {sorted(_FORMATS)}"
        )
    return _FORMATS[type_]


def _launch_config(entry: CubinEntry) -> driver.CUlaunchConfig:
    """A configuration that lacks the grid and the stream."""
    config = driver.CUlaunchConfig()
    config.blockDimX, config.blockDimY, config.blockDimZ = entry.threads, 1, 1
    config.sharedMemBytes = entry.shared_bytes
    config.numAttrs = 0
    if entry.num_ctas > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x = entry.num_ctas
        cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
        config.attrs = [cluster]
        config.numAttrs = 1
    return config

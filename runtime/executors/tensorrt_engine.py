"""An engine file in memory, for both of TensorRT's packages, whose Python interfaces are one."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trtforge.errors import ConfigError, DeviceError, PluginError
from trtforge.plugins.bundle import Bundle
from trtforge.plugins.kernels import KERNELS
from trtforge.plugins.trt_adapter import register
from trtforge.runtime.executors.device_memory import DeviceStream
from trtforge.tensorrt_package import load_package, package_logger, with_reasons


@functools.cache  # TensorRT's registry is the process's, and knows no unregistering here
def register_plugins(package: str, kernels: Path) -> None:
    """Let engines find their plugins, whose kernels are in the folder `kernels`.

    Raises ConfigError if they are missing or damaged, and if the process serves those of another folder.
    """
    try:
        register(load_package(package), KERNELS, Bundle.load(kernels))
    except PluginError as error:
        raise ConfigError(f"the engine's plugins cannot be had: {error}") from error


class Engine:
    """A deserialized engine, and one piece of memory for what its steps compute in between.

    Steps run one after the other on one stream, so that all contexts share that memory.
    """

    def __init__(self, path: Path, package: str, stream: DeviceStream, peers: Any = None) -> None:
        """`peers` is the capsule of the NCCL communicator of this rank's stage, if it has others.

        Raises ConfigError, with what TensorRT says, for a file that it does not load.
        """
        self._peers = peers
        self._trt = load_package(package)
        self._logger = package_logger(package)
        self._logger.errors.clear()
        self._stream = stream
        self._runtime = self._trt.Runtime(self._logger)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            headline = f"{package} {self._trt.__version__} does not load {path}"
            raise ConfigError(with_reasons(headline, self._logger.errors))
        self.activation_bytes = max(
            self._engine.get_device_memory_size_for_profile_v2(profile)
            for profile in range(self._engine.num_optimization_profiles)
        )
        self._activations = stream.allocate(self.activation_bytes, "the engine's activations")

    def inputs_on_host(self, names: Iterable[str]) -> list[str]:
        """Those of the inputs that have to be in host memory, because shapes follow from their values."""
        host = self._trt.TensorLocation.HOST
        return [name for name in names if self._engine.get_tensor_location(name) == host]

    def row_size(self, name: str) -> int:
        """Numbers in a row of a tensor of rows."""
        _, size = self._engine.get_tensor_shape(name)
        return int(size)

    def create_context(self, profile: int) -> ExecutionContext:
        """A context for steps of this optimization profile."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        created = self._engine.create_execution_context(strategy)
        self._require(created is not None, "creating an execution context")
        chosen = created.set_optimization_profile_async(profile, self._stream.handle)
        self._require(chosen, f"choosing the optimization profile {profile}")
        if self._peers is not None:  # waits until all ranks have come here
            joined = created.set_communicator(self._peers)
            self._require(joined, "giving a context the communicator of its ranks")
        created.set_device_memory(self._activations, self.activation_bytes)
        return ExecutionContext(created, self._stream.handle, self._require)

    def _require(self, done: bool, what: str) -> None:
        if not done:
            reasons = tuple(self._logger.errors)
            self._logger.errors.clear()
            raise DeviceError(with_reasons(f"TensorRT failed in {what}", reasons))


class ExecutionContext:
    """Addresses and shapes of a step's tensors. What TensorRT refuses is a DeviceError with its reasons."""

    def __init__(self, context: Any, stream: int, require: Callable[[bool, str], None]) -> None:
        self._context = context
        self._stream = stream
        self._require = require

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Say where tensors are, by name."""
        for name, address in addresses.items():
            bound = self._context.set_tensor_address(name, address)
            self._require(bound, f"binding {name} to the address {address:#x}")

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Say which shapes inputs have from now on, by name."""
        for name, shape in shapes.items():
            self._require(self._context.set_input_shape(name, shape), f"giving {name} the shape {shape}")

    def enqueue(self) -> None:
        """Put a step on the engine's stream."""
        self._require(self._context.execute_async_v3(self._stream), "enqueueing a step")

"""Stands in for TensorRT-RTX where there is no GPU: its runtime's classes, as far as an executor uses them.

An "engine" is JSON: inputs and output (names, without caches), vocab_size (of the rank, from first_token),
num_layers, hidden_size and dtype of hidden states, profiles (smallest and largest sizes), activation_bytes of
each. It computes logits that are a function of all tokens of a sequence. Every layer has a cache of one head
of one float32 and keeps the same there: keys are tokens, values are positions.

Stages hand on hidden states: a token, what its stage's caches make of all tokens up to it, its position. A
stage whose own caches make something else of them, or whose padding is not zeros, computes NaN.

Work is put on the stream of the fake driver with the shapes and addresses that it has when it is enqueued: so
captured work does what a captured graph does. What TensorRT would refuse is logged and refused here too.
LOG has what was asked of contexts.
"""

from __future__ import annotations

import ctypes
import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "1.2.3"
LOG: list[tuple[Any, ...]] = []

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_INPUTS = {
    "input_ids": ("T",),
    "position_ids": ("T",),
    "block_tables": ("B", "max_blocks"),
    "cu_seqlens": ("B_plus_1",),
    "context_lens": ("B",),
    "slot_mapping": ("T",),
    "logits_indices": ("R",),
    "hidden_states": ("T", "hidden"),
}


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3

    def __init__(self) -> None:
        pass


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: Any) -> Engine | None:
        LOG.append(("deserialize", len(data)))
        try:
            return Engine(json.loads(bytes(data)), self._logger)
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "the magic tag does not match")
            return None


class Engine:
    def __init__(self, values: Any, logger: Any) -> None:
        self.values = values
        self.logger = logger
        self.num_optimization_profiles = len(values["profiles"])
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.callbacks: list[Any] = []  # which the driver does not keep alive

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return int(self.values["activation_bytes"][profile])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name in (*self.values["inputs"], self.values["output"])
        assert name in ("hidden_states", "hidden_states_out")
        return (-1, self.values["hidden_size"])

    def get_tensor_location(self, name: str) -> TensorLocation:
        assert name in self.values["inputs"]
        is_host = name == os.environ.get("FAKE_TENSORRT_HOST_INPUT")
        return TensorLocation.HOST if is_host else TensorLocation.DEVICE

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._profile = -1
        self._memory: tuple[int, int] = (0, 0)
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = memory, size

    def set_communicator(self, communicator: Any) -> bool:
        is_valid = ctypes.pythonapi.PyCapsule_IsValid
        is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
        with Path(os.environ["FAKE_CUDA_RECORD"]).open("a") as file:
            file.write(f"set_communicator {self._profile}\n")
        return bool(is_valid(communicator, b"ncclComm_t"))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        LOG.append(("bind", id(self), name, memory))
        self._addresses[name] = memory
        return name in self._names() or self._refuse(f"{name} is no tensor of the engine")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        LOG.append(("shape", id(self), name, shape))
        self._shapes[name] = shape
        if name not in self._names():
            return self._refuse(f"{name} is no tensor of the engine")
        if name not in _INPUTS:
            return True
        hidden = self._engine.values["hidden_size"]
        ranges = {**self._engine.values["profiles"][self._profile], "hidden": (hidden, hidden)}
        fits = all(ranges[dim][0] <= n <= ranges[dim][1] for dim, n in zip(_INPUTS[name], shape, strict=True))
        return fits or self._refuse(f"{name} {shape} is outside the profile {self._profile}")

    def execute_async_v3(self, stream: int) -> bool:
        LOG.append(("enqueue", id(self), self._profile))
        failing, _, tensor = os.environ.get("FAKE_TENSORRT_FAIL", "").partition(" ")
        if failing == "enqueue" and (not tensor or tensor in self._names()):
            return self._refuse("a plugin failed")
        missing = self._names() - self._addresses.keys()
        if missing:
            return self._refuse(f"no address of {sorted(missing)}")
        missing = set(self._engine.values["inputs"]) - self._shapes.keys()
        if missing:
            return self._refuse(f"no shape of {sorted(missing)}")
        if self._memory[1] < self._engine.get_device_memory_size_for_profile_v2(self._profile):
            return self._refuse("not enough device memory")
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        callback = _HostFunction(lambda _: _compute(addresses, shapes, self._engine.values))
        self._engine.callbacks.append(callback)
        status = self._engine.driver.cuLaunchHostFunc(ctypes.c_void_p(stream), callback, None)
        return status == 0 or self._refuse(f"the driver says {status}")

    def _names(self) -> set[str]:
        caches = range(self._engine.values["num_layers"])
        return (
            {*self._engine.values["inputs"], self._engine.values["output"]}
            | {f"kv_cache.{layer}" for layer in caches}
            | {f"kv_cache_out.{layer}" for layer in caches}
        )

    def _refuse(self, reason: str) -> bool:
        self._engine.logger.log(ILogger.Severity.ERROR, reason)
        return False


def _compute(addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], engine: Any) -> None:
    def array(name: str, shape: tuple[int, ...], dtype: str = "int32") -> Any:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(addresses[name]))
        return data.view(dtype).reshape(shape)

    step = {
        name: array(name, shapes[name], engine["dtype"] if name == "hidden_states" else "int32")
        for name in engine["inputs"]
    }
    handed = step.get("hidden_states")
    tokens = step["input_ids"] if handed is None else handed[:, 0]
    positions, slots = step["position_ids"], step["slot_mapping"]
    histories = []
    for layer in range(engine["num_layers"]):
        assert addresses[f"kv_cache.{layer}"] == addresses[f"kv_cache_out.{layer}"]
        cache = array(f"kv_cache.{layer}", shapes[f"kv_cache.{layer}"], "float32")
        block_size = cache.shape[2]
        stored = slots >= 0
        blocks, offsets = slots[stored] // block_size, slots[stored] % block_size
        cache[blocks, 0, offsets, 0, 0] = tokens[stored]
        cache[blocks, 1, offsets, 0, 0] = positions[stored]
        histories.append(_histories(cache, step, block_size))
    same = (np.array_equal(history, histories[0], equal_nan=True) for history in histories)
    assert all(same), "layers differ"
    _write(array, engine, step, handed, histories[0])


def _write(array: Any, engine: Any, step: dict[str, Any], handed: Any, history: Any) -> None:
    """The output, of what the caches make of each token."""
    positions = step["position_ids"]
    if handed is not None:
        expected = np.stack([handed[:, 0], history, positions], axis=1).astype(engine["dtype"])
        expected[step["slot_mapping"] < 0] = 0
        if not np.array_equal(handed, expected):
            history = np.full_like(history, np.nan)
    if engine["output"] == "hidden_states_out":
        tokens = step["input_ids"] if handed is None else handed[:, 0]
        out = array("hidden_states_out", (len(positions), engine["hidden_size"]), engine["dtype"])
        out[:] = np.stack([tokens, history, positions], axis=1)
    else:
        wanted = history[step["logits_indices"]]
        logits = array("logits", (len(wanted), engine["vocab_size"]), "float32")
        first = engine["first_token"]
        logits[:] = np.cos(np.outer(wanted, np.arange(first + 1, first + engine["vocab_size"] + 1)))


def _histories(cache: Any, step: dict[str, Any], block_size: int) -> Any:
    """[T] a number for all tokens up to each one."""
    rows = np.arange(len(step["position_ids"]))
    sequences = np.searchsorted(step["cu_seqlens"], rows, side="right") - 1
    numbers = []
    for row, sequence in zip(rows, sequences, strict=True):
        slots = np.arange(step["position_ids"][row] + 1)
        blocks = step["block_tables"][sequence, slots // block_size]
        keys = cache[blocks, 0, slots % block_size, 0, 0].astype(np.float64)
        values = cache[blocks, 1, slots % block_size, 0, 0]
        factors = np.modf((slots + 1) * np.sqrt(2))[0]
        # Padding reads what is in block 0, whatever that is.
        is_known = step["slot_mapping"][row] < 0 or np.array_equal(values, slots)
        numbers.append(((keys + 1) * factors).sum() if is_known else np.nan)
    return np.array(numbers)

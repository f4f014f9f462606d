"""NCCL communicators for TensorRT, whose contexts use them for the sums over ranks.

NCCL is needed for making one alone, so its four functions are called as they are in C. No machine with
several GPUs has run this yet.
"""

from __future__ import annotations

import ctypes
from typing import Any

from trtforge.errors import ConfigError, DeviceError
from trtforge.runtime.parallel.communicator import Communicator

UNIQUE_ID_BYTES = 128
CAPSULE_NAME = b"ncclComm_t"

_Handle = ctypes.c_void_p


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class NcclCommunicator:
    """The ranks of one pipeline stage, each with the GPU that is current in its thread."""

    def __init__(self, communicator: Communicator) -> None:
        """Meets the other ranks of the stage, which have to make theirs at the same time.

        Raises ConfigError if NCCL is not installed, and DeviceError for what it refuses.
        """
        self._library = _load()
        peers = communicator.shape.peers(communicator.rank)
        tp_rank = communicator.rank - peers.start
        unique_id = _UniqueId()
        if tp_rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(unique_id))
        data = communicator.tell_stage(bytes(unique_id))
        ctypes.memmove(ctypes.byref(unique_id), data, UNIQUE_ID_BYTES)
        self._handle = _Handle()
        arguments = (ctypes.byref(self._handle), ctypes.c_int(len(peers)), unique_id, ctypes.c_int(tp_rank))
        self._call("ncclCommInitRank", *arguments)
        # TensorRT's bindings take it as a capsule, which has to outlive the contexts that were given it.
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule: Any = new_capsule(self._handle, CAPSULE_NAME, None)

    def close(self) -> None:
        """Leave the group; nothing may use the capsule any more. Idempotent."""
        if self._handle:
            self._call("ncclCommDestroy", self._handle)
            self._handle = _Handle()

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            self._library.ncclGetErrorString.restype = ctypes.c_char_p
            reason = self._library.ncclGetErrorString(status).decode()
            raise DeviceError(f"NCCL failed in {function}: {reason}")


def _load() -> ctypes.CDLL:
    from cuda import pathfinder

    try:
        path = pathfinder.load_nvidia_dynamic_lib("nccl").abs_path
    except (pathfinder.DynamicLibNotFoundError, RuntimeError) as error:
        raise ConfigError(
            "a model on several GPUs needs NCCL: pip install nvidia-nccl-cu13, or put libnccl.so.2 where the "
            f"loader finds it. {error}"
        ) from error
    return ctypes.CDLL(path)

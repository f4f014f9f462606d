"""What a rank's graph in torch has of the other ranks: sums, and hidden states from stage to stage."""

from __future__ import annotations

import datetime
from typing import Protocol

import ml_dtypes
import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trtforge.runtime.parallel.communicator import Array, Communicator

_NO_LIMIT_S = 10**6  # a timeout there has to be


class Links(Protocol):
    """The other ranks, for tensors of one device."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of this stage."""
        ...

    def send(self, x: Tensor) -> None:
        """To the next stage."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """From the stage before."""
        ...


class HostLinks:
    """For tensors in host memory."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def all_reduce(self, x: Tensor) -> Tensor:
        """In the order of ranks, in float32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._communicator.all_reduce(_array(x), _array(y))
        return y

    def send(self, x: Tensor) -> None:
        """To the same rank of the next stage."""
        self._communicator.send(_array(x.contiguous()))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """From the same rank of the stage before."""
        x = torch.empty(shape, dtype=dtype)
        self._communicator.receive(_array(x))
        return x


def _array(x: Tensor) -> Array:
    """The tensor's memory."""
    if x.dtype == torch.bfloat16:  # numpy has it with ml_dtypes only
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = x.numpy()
    return array


class DeviceLinks:
    """For tensors on GPUs, one for each rank."""

    def __init__(
        self, communicator: Communicator, device: torch.device, *, timeout_s: float, backend: str = "nccl"
    ) -> None:
        """Meets the other ranks, which have to make theirs at the same time. `timeout_s` 0: no limit."""
        rank, shape = communicator.rank, communicator.shape
        timeout = datetime.timedelta(seconds=timeout_s or _NO_LIMIT_S)
        # The first rank takes a port that is free, and tells it to the others.
        store = None
        if rank == 0:
            store = TCPStore(communicator.host, 0, shape.num_ranks, True, timeout, False)
        port = 0 if store is None else store.port
        port = int.from_bytes(communicator.tell(port.to_bytes(2, "big")), "big")
        if store is None:
            store = TCPStore(communicator.host, port, shape.num_ranks, False, timeout)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=shape.num_ranks, timeout=timeout
        )
        stages = range(0, shape.num_ranks, shape.tp_size)
        groups = [distributed.new_group(list(shape.peers(first))) for first in stages]
        self._group = groups[shape.pp_rank(rank)]
        self._before, self._next = rank - shape.tp_size, rank + shape.tp_size
        self._device = device

    def all_reduce(self, x: Tensor) -> Tensor:
        """In the order and the precision that the backend has."""
        y = x.clone()
        distributed.all_reduce(y, group=self._group)
        return y

    def send(self, x: Tensor) -> None:
        """To the same rank of the next stage."""
        distributed.send(x.contiguous(), self._next)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """From the same rank of the stage before."""
        x = torch.empty(shape, dtype=dtype, device=self._device)
        distributed.recv(x, self._before)
        return x

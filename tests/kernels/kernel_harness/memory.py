"""Kernels in Triton's interpreter stay within the memory that they were given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_buffers: dict[str, tuple[int, int]] = {}  # name -> first address, and the one past the last


@contextmanager
def only(buffers: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within it, kernels may touch these buffers alone; else an IndexError ends them.

    The interpreter reads and writes through raw addresses: what is out of bounds would end the process, or
    change some other memory of it.
    """
    _buffers.update(
        (name, (buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)) for name, buffer in buffers.items()
    )
    try:
        yield
    finally:
        _buffers.clear()


def install() -> None:
    """Change the interpreter of this process, once, whatever else has changed it before."""
    for name, first in (("create_masked_load", 0), ("create_masked_store", 0), ("create_atomic_rmw", 1)):
        setattr(InterpreterBuilder, name, _checked(getattr(InterpreterBuilder, name), first))


def _checked(access: Callable[..., Any], first: int) -> Callable[..., Any]:
    """`access`, whose argument number `first` is the pointers."""
    parameters = list(inspect.signature(access).parameters)
    mask = parameters.index("mask") - 1

    @functools.wraps(access)
    def check_and_access(builder: InterpreterBuilder, *arguments: Any) -> Any:
        _check(arguments[first], arguments[mask])
        return access(builder, *arguments)

    return check_and_access


def _check(pointers: TensorHandle, mask: TensorHandle) -> None:
    if not _buffers:
        return
    element_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    outside = np.ones(addresses.shape, bool)
    for first, end in _buffers.values():
        outside &= (addresses < first) | (addresses + np.uint64(element_bytes) > end)
    if outside.any():
        address = int(addresses[outside][0])
        # The one that begins before it, or else the first of all.
        name, (first, end) = max(_buffers.items(), key=lambda item: (item[1][0] <= address, item[1][0]))
        raise IndexError(
            f"{int(outside.sum())} of {addresses.size} addresses are outside of all buffers; one is "
            f"{address - first} bytes from the beginning of {name!r}, which has {end - first} bytes"
        )

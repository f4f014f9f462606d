"""AllReduce of one rank."""

from __future__ import annotations

from trtforge.plugins.op import Array


def all_reduce(x: Array) -> Array:
    """x as it is: a rank that is alone has the whole sum."""
    return x

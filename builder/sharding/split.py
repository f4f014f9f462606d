"""Who gets how much: the arithmetic of dividing heads, features and layers among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

from trtforge.errors import ConfigError

Range: TypeAlias = tuple[int, int]  # start, stop

# Kernels read memory in pieces of this many elements.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Ranks that a model is divided among: `tp` of them in each of `pp` stages."""

    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        """Of all stages."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of one rank: queries `heads`, which attend to `kv_heads`."""

    heads: Range
    kv_heads: Range


def split_evenly(size: int, parts: int, multiple: int = 1) -> tuple[Range, ...]:
    """0 to `size` in `parts` ranges, each a multiple of `multiple`, which divides `size`; the first ones are
    longer."""
    units, longer = divmod(size // multiple, parts)
    lengths = [multiple * (units + (part < longer)) for part in range(parts)]
    return tuple(pairwise(accumulate(lengths, initial=0)))


def split_features(size: int, parts: int, multiples: Sequence[int] = ()) -> tuple[Range, ...] | None:
    """Features of ranks: in units of the first of `multiples` that gives each rank one at least; None if none
    does, or if there are fewer features than ranks. Without `multiples` they are kept aligned where that
    costs little.
    """
    if size < parts:
        return None
    if not multiples:
        units, rest = divmod(size, _ALIGNMENT)
        is_cheap = rest == 0 and (units % parts == 0 or units >= _ALIGNMENT * parts)
        return split_evenly(size, parts, _ALIGNMENT if is_cheap else 1)
    for multiple in multiples:
        if size % multiple == 0 and size // multiple >= parts:
            return split_evenly(size, parts, multiple)
    return None


def split_heads(num_heads: int, num_kv_heads: int, tp: int) -> tuple[HeadShare, ...]:
    """The heads of each of `tp` ranks.

    Ranks have whole KV heads with their query heads; if there are more ranks than KV heads, ranks share the
    query heads of one KV head, of which each has a copy. Raises ConfigError if a rank would have no head.
    """
    if tp > num_heads:
        raise ConfigError(f"--tp {tp} is more than the {num_heads} attention heads of a layer")
    per_kv_head = num_heads // num_kv_heads
    if tp <= num_kv_heads:
        ranges = split_evenly(num_kv_heads, tp)
        return tuple(
            HeadShare((start * per_kv_head, stop * per_kv_head), (start, stop)) for start, stop in ranges
        )
    shares = []
    for kv_head, (first, last) in enumerate(split_evenly(tp, num_kv_heads)):
        for start, stop in split_evenly(per_kv_head, last - first):
            offset = kv_head * per_kv_head
            shares.append(HeadShare((offset + start, offset + stop), (kv_head, kv_head + 1)))
    return tuple(shares)


def split_layers(num_layers: int, pp: int) -> tuple[Range, ...]:
    """The layers of each of `pp` stages. Raises ConfigError if a stage would have none."""
    if pp > num_layers:
        raise ConfigError(f"--pp {pp} is more than the {num_layers} layers of the model")
    return split_evenly(num_layers, pp)

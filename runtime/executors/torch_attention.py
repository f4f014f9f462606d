"""PagedAttention in torch: for CPUs, and for GPUs that have no compiled kernel of it.

Sequences with equally many new tokens are computed together: all decodes of a step in one go.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_SCORES = 1 << 26  # float32 scores held at once, 256 MiB; more queries than that are cut into chunks


@dataclass(frozen=True, slots=True)
class _Group:
    """B sequences with Q new tokens each, and C blocks of the longest."""

    rows: Tensor  # [B, Q]: their tokens' places in the step
    blocks: Tensor  # [B, C]
    context_lens: Tensor  # [B]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tokens of a step are, on its device; int64."""

    stored: Tensor | None  # tokens that have a slot; None: all
    blocks: Tensor  # [stored]: where they are stored
    offsets: Tensor  # [stored]
    groups: tuple[_Group, ...]


class TorchAttention:
    """The attention of all layers.

    Lengths are read on the host, once a step: it is told by its tensors, which are new ones in every step.
    """

    def __init__(self) -> None:
        self._step: tuple[Tensor, ...] = ()
        self._layout: _Layout | None = None

    def __call__(
        self,
        q: Tensor,  # [T, H, D]
        k: Tensor,  # [T, Hkv, D]
        v: Tensor,  # [T, Hkv, D]
        kv_cache: Tensor,  # [num_blocks, 2, block_size, Hkv, D]
        block_tables: Tensor,  # [B, max_blocks]
        cu_seqlens: Tensor,  # [B + 1]
        context_lens: Tensor,  # [B]
        slot_mapping: Tensor,  # [T]
        sinks: Tensor | None = None,  # [H]
        alibi_slopes: Tensor | None = None,  # [H]
        k_scale: Tensor | None = None,  # [1]
        v_scale: Tensor | None = None,  # [1]
        *,
        scale: float,
        window: int,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """(out [T, H, D], kv_cache, which is written in place). Scores and weights are float32."""
        step = (block_tables, cu_seqlens, context_lens, slot_mapping)
        if self._layout is None or any(one is not other for one, other in zip(step, self._step, strict=True)):
            self._step, self._layout = step, _make_layout(*step, block_size=kv_cache.shape[2])
        layout = self._layout
        for index, (new, unit) in enumerate(((k, k_scale), (v, v_scale))):
            if layout.stored is not None:
                new = new[layout.stored]
            stored = _as_stored(new, unit, kv_cache.dtype)
            _bits(kv_cache)[layout.blocks, index, layout.offsets] = _bits(stored)
        scores = _Scores(sinks, alibi_slopes, window, softcap)
        out = torch.zeros_like(q)
        for group in layout.groups:
            queries = q[group.rows].float() * scale
            keys, values = _gather(kv_cache, group, k_scale, v_scale)
            out[group.rows] = scores.attend(queries, keys, values, group.context_lens).to(q.dtype)
        return out, kv_cache


def _make_layout(
    block_tables: Tensor, cu_seqlens: Tensor, context_lens: Tensor, slot_mapping: Tensor, *, block_size: int
) -> _Layout:
    starts, lens = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
    contexts = context_lens.tolist()
    by_len: dict[int, list[int]] = defaultdict(list)
    for sequence, num_new in enumerate(lens):
        if num_new:
            by_len[num_new].append(sequence)
    device = slot_mapping.device
    groups = []
    for num_new, sequences in by_len.items():
        chosen = torch.tensor(sequences, device=device)
        first = torch.tensor([starts[sequence] for sequence in sequences], device=device)
        num_blocks = -(-max(contexts[sequence] for sequence in sequences) // block_size)
        groups.append(
            _Group(
                rows=first[:, None] + torch.arange(num_new, device=device),
                # What is behind the end of a shorter sequence's table may be anything, but has to exist.
                blocks=block_tables[chosen, :num_blocks].long().clamp(min=0),
                context_lens=context_lens[chosen].long(),
            )
        )
    slots = slot_mapping.long()
    stored = (slots >= 0).nonzero().squeeze(1)
    slots = slots[stored]
    return _Layout(
        stored=None if len(stored) == len(slot_mapping) else stored,
        blocks=slots // block_size,
        offsets=slots % block_size,
        groups=tuple(groups),
    )


def _as_stored(x: Tensor, unit: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of this type keeps them: nearest, ties to even, 8 bits saturating."""
    if unit is not None:
        x = x.float() / unit
    if dtype == torch.int8:
        x = x.round().clamp(-128, 127)
    elif dtype == torch.float8_e4m3fn:
        bound = torch.finfo(dtype).max
        x = x.clamp(-bound, bound)
    return x.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """As a type that torch can index on every device, which 8-bit floats are not."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _gather(
    kv_cache: Tensor, group: _Group, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of a group's blocks, float32 [B, Hkv, S, D]."""
    cached = _bits(kv_cache)[group.blocks].view(kv_cache.dtype)  # [B, C, 2, block_size, Hkv, D]
    num_seqs, _, _, _, num_kv_heads, head_dim = cached.shape
    keys, values = (
        cached[:, :, index].reshape(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2).float()
        for index in (0, 1)
    )
    if k_scale is not None:
        keys = keys * k_scale
    if v_scale is not None:
        values = values * v_scale
    return keys, values


@dataclass(frozen=True, slots=True)
class _Scores:
    """What becomes of the products of queries and keys."""

    sinks: Tensor | None  # [H]: one more score a head, whose weight goes nowhere
    alibi_slopes: Tensor | None  # [H]
    window: int
    softcap: float

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, context_lens: Tensor) -> Tensor:
        """Scaled queries [B, Q, H, D], the last of their sequences' tokens -> [B, Q, H, D]; all float32."""
        num_seqs, num_new, num_heads, head_dim = q.shape
        num_kv_heads, num_slots = keys.shape[1:3]
        positions = context_lens[:, None] - num_new + torch.arange(num_new, device=q.device)  # [B, Q]
        distances = torch.arange(num_slots, device=q.device) - positions[:, :, None]  # [B, Q, S]
        visible = distances <= 0
        if self.window:
            visible &= distances > -self.window
        # What nobody sees may be NaN, which a weight of zero does not remove.
        values = values.masked_fill(~visible.any(dim=1)[:, None, :, None], 0.0)

        q = q.reshape(num_seqs, num_new, num_kv_heads, -1, head_dim).permute(
            0, 2, 3, 1, 4
        )  # [B, Hkv, G, Q, D]
        chunk = max(1, _MAX_SCORES // (num_seqs * num_heads * num_slots))
        parts = []
        for begin in range(0, num_new, chunk):
            rows = slice(begin, begin + chunk)
            scores = q[..., rows, :] @ keys.unsqueeze(2).transpose(-1, -2)  # [B, Hkv, G, chunk, S]
            weights = self._weights(scores, visible[:, None, None, rows], distances[:, None, None, rows])
            parts.append(weights @ values.unsqueeze(2))
        out = torch.cat(parts, dim=-2).permute(0, 3, 1, 2, 4)
        return out.reshape(num_seqs, num_new, num_heads, head_dim)

    def _weights(self, scores: Tensor, visible: Tensor, distances: Tensor) -> Tensor:
        """Softmax over the last dim of [B, Hkv, G, Q, S]; the others are broadcast to it."""
        heads = (*scores.shape[1:3], 1, 1)
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.alibi_slopes is not None:
            scores = scores + self.alibi_slopes.reshape(heads) * distances
        scores = scores.masked_fill(~visible, -torch.inf)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.float().reshape(heads).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]

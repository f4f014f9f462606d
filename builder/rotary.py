"""Which rotary embedding a model's own apply_rotary_pos_emb computes, found by trying it on numbers.

The ONNX operator RotaryEmbedding (opset 23) takes cos and sin of one angle per pair of elements, and knows
two ways to pair them: (i, i + R/2), "halves", and (2i, 2i + 1), "interleaved". Models differ in that and in
how they hand over cos and sin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

CosLayout = Literal["halves", "repeated", "single"]
Rotate = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RotaryConvention:
    """How a model rotates: which elements form a pair, and how cos and sin come.

    cos_layout: `halves` cat(c, c), `repeated` each value of c twice, `single` c itself.
    """

    interleaved: bool
    cos_layout: CosLayout

    def angles(self, cos: torch.Tensor) -> torch.Tensor:
        """The one value per pair, [..., R/2], out of what the model passes (cos or sin)."""
        if self.cos_layout == "single":
            return cos
        if self.cos_layout == "repeated":
            return cos[..., ::2]
        return cos[..., : cos.shape[-1] // 2]

    def expand(self, angles: torch.Tensor) -> torch.Tensor:
        """What the model passes for `angles` [..., R/2]; the inverse of `angles()`."""
        if self.cos_layout == "single":
            return angles
        if self.cos_layout == "repeated":
            return angles.repeat_interleave(2, dim=-1)
        return torch.cat((angles, angles), dim=-1)


CONVENTIONS = (
    RotaryConvention(interleaved=False, cos_layout="halves"),  # GPT-NeoX, Llama
    RotaryConvention(interleaved=True, cos_layout="repeated"),  # GPT-J, Cohere
    RotaryConvention(interleaved=True, cos_layout="halves"),  # GLM
    RotaryConvention(interleaved=False, cos_layout="single"),  # gpt-oss
    RotaryConvention(interleaved=True, cos_layout="single"),
)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate the first R of x's D elements: x [..., D], cos and sin [..., R/2].

    Source: RoFormer (arXiv 2104.09864), in the form of ONNX RotaryEmbedding-23.
    """
    size = 2 * cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., : size // 2], rotated[..., size // 2 :]
    pairs = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def recognize(apply_rotary_pos_emb: Rotate, *, partial: bool = False) -> RotaryConvention | None:
    """The convention that the function agrees with on random numbers, or None.

    With `partial` cos and sin are narrower than the heads, and the function has to leave the rest as it is.
    """
    rotary_dim = 8 if partial else 16
    return next((c for c in CONVENTIONS if _agrees(apply_rotary_pos_emb, c, rotary_dim, head_dim=16)), None)


def _agrees(
    apply_rotary_pos_emb: Rotate, convention: RotaryConvention, rotary_dim: int, head_dim: int
) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        q = torch.randn(3, 4, 1, head_dim, generator=generator)  # [T, H, 1, D]
        k = torch.randn(3, 2, 1, head_dim, generator=generator)
        angles = torch.randn(3, 1, rotary_dim // 2, generator=generator)
        cos, sin = angles.cos(), angles.sin()
        try:
            results = apply_rotary_pos_emb(q, k, convention.expand(cos), convention.expand(sin))
        except (RuntimeError, TypeError):  # cos comes in another width, or not at this place
            return False
        expected = [rotate(x, cos[:, None], sin[:, None], interleaved=convention.interleaved) for x in (q, k)]
    return all(
        got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
        for got, want in zip(results, expected, strict=True)
    )

"""From rows of logits to figures of a text: losses of its tokens, and distances from another model's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.checking.comparison import log_softmax
from trtforge.errors import EngineBuildError
from trtforge.runtime.executor import Float32Array, Int32Array

Float64Array = npt.NDArray[np.float64]

_CHUNK_ELEMENTS = 1 << 24  # of logits that are widened at a time


@dataclass(frozen=True, slots=True)
class Rows:
    """Of N scored tokens: their losses and, with another model's logits, how far the two are apart."""

    losses: Float64Array  # [N], nats
    reference_losses: Float64Array  # [N], or none
    divergences: Float64Array  # [N], KL from the reference in nats, or none
    agreements: npt.NDArray[np.bool_]  # [N], whether the likeliest token is the same, or none

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """All rows, one after the other."""
        return Rows(
            np.concatenate([part.losses for part in parts]),
            np.concatenate([part.reference_losses for part in parts]),
            np.concatenate([part.divergences for part in parts]),
            np.concatenate([part.agreements for part in parts]),
        )


def score(logits: Float32Array, targets: Int32Array, reference: Float32Array | None) -> Rows:
    """The rows of `logits`, [N, V], of which row i predicts token `targets[i]`, against those of `reference`.

    Raises EngineBuildError for logits that are not finite.
    """
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    chunks = [slice(start, start + step) for start in range(0, len(logits), step)]
    return Rows.concatenate(
        [
            _score(logits[rows], targets[rows], None if reference is None else reference[rows])
            for rows in chunks
        ]
    )


def _score(logits: Float32Array, targets: Int32Array, reference: Float32Array | None) -> Rows:
    picked = np.arange(len(targets)), targets
    log_q = _log_probabilities(logits)
    if reference is None:
        none = np.empty(0)
        return Rows(-log_q[picked], none, none, np.empty(0, np.bool_))
    log_p = _log_probabilities(reference)
    return Rows(
        losses=-log_q[picked],
        reference_losses=-log_p[picked],
        divergences=(np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        agreements=logits.argmax(axis=1) == reference.argmax(axis=1),
    )


def _log_probabilities(logits: Float32Array) -> Float64Array:
    if not np.isfinite(logits).all():
        raise EngineBuildError("the model computes NaN or infinity: its weights are wrong, build it again")
    return log_softmax(logits.astype(np.float64))


def perplexity_of(losses: Float64Array) -> tuple[float, float]:
    """The perplexity of tokens with these losses, and its standard error if the losses are independent.

    Of differences of losses it is the ratio of two perplexities.
    """
    perplexity = math.exp(losses.mean())
    error = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return perplexity, perplexity * error

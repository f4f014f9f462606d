"""What was seen of one request, and its latencies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """A response that carried `num_tokens` (1 or more), and when it was here."""

    arrival_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request. Times are seconds after the start of the run.

    `error` is None when it succeeded, else the kind of failure: "request" (refused as wrong),
    "capacity", "server", or "interrupted" (stopped here, not a failure of the server).
    """

    index: int
    scheduled_s: float | None  # None where requests are not planned for a time
    sent_s: float
    end_s: float  # the last response, or the failure
    chunks: tuple[TokenChunk, ...]
    num_input_tokens: int
    max_tokens: int
    error: str | None = None
    message: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the whole answer came, with at least one token."""
        return self.error is None

    @property
    def num_output_tokens(self) -> int:
        """Tokens that came."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from sending to the first response that carries one; None without any."""
        return self.chunks[0].arrival_s - self.sent_s if self.chunks else None

    @property
    def e2el_s(self) -> float:
        """End-to-end latency: from sending to the last response."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first one; None for answers of less than two."""
        ttft_s = self.ttft_s
        if ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2el_s - ttft_s) / (self.num_output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Inter-token latencies, one for each token but the first."""
        return token_gaps_s(self.chunks)


def token_gaps_s(chunks: Sequence[TokenChunk]) -> list[float]:
    """The gap before each token but the first.

    Tokens that came in one chunk share the time since the chunk before in equal parts, so that gaps always
    add up to the time between the first token and the last. In the first chunk there is nothing to share:
    its further tokens have gaps of 0.
    """
    gaps = [0.0] * (chunks[0].num_tokens - 1) if chunks else []
    for before, chunk in itertools.pairwise(chunks):
        gaps += [(chunk.arrival_s - before.arrival_s) / chunk.num_tokens] * chunk.num_tokens
    return gaps

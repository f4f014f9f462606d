"""Which beams go on and which answers are kept: the arithmetic of beam search, without a model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from trtforge.runtime.outputs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Beam:
    """Tokens generated so far and the sum of their log-probabilities."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token
    cumulative_logprob: float = 0.0


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam. `score` is its cumulative log-probability / its length ** length_penalty."""

    beam: Beam
    score: float


class BeamSelection:
    """Beam search as `generate(num_beams=beam_width, early_stopping=False)` of transformers does it.

    Among the `beam_width` best continuations of all beams those that end with a stop token are finished;
    the best ones that do not end go on. The search is over when `beam_width` are finished of which none is
    worse than the best running one would be if it ended now, or at `max_tokens`.
    """

    def __init__(
        self,
        beam_width: int,
        max_tokens: int,
        stop_token_ids: frozenset[int],
        length_penalty: float = 1.0,
        min_tokens: int = 0,
    ) -> None:
        self.running: list[Beam] = [Beam()]
        self._beam_width = beam_width
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._length_penalty = length_penalty
        self._finished: list[Hypothesis] = []  # the best first
        self._num_tokens = 0

    @property
    def num_candidates(self) -> int:
        """How many of each beam's likeliest tokens have to be known: enough if all stop tokens lead."""
        return self._beam_width + len(self._stop_token_ids)

    @property
    def is_over(self) -> bool:
        """Whether no further step can change the result."""
        if not self.running or self._num_tokens >= self._max_tokens:
            return True
        if len(self._finished) < self._beam_width:
            return False
        return self._score(self.running[0]) <= self._finished[-1].score

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Take one step: for each running beam its likeliest tokens with their log-probabilities, the
        likeliest first."""
        self._num_tokens += 1
        continuations = [
            (beam.cumulative_logprob + logprob, position, rank)
            for position, (beam, tokens) in enumerate(zip(self.running, candidates, strict=True))
            for rank, (token_id, logprob) in enumerate(tokens)
            if self._num_tokens > self._min_tokens or token_id not in self._stop_token_ids
        ]
        best = heapq.nlargest(
            self._beam_width * (1 + len(self._stop_token_ids)), continuations, key=lambda entry: entry[0]
        )
        is_last = self._num_tokens >= self._max_tokens
        running: list[Beam] = []
        for place, (cumulative_logprob, position, rank) in enumerate(best):
            ends = is_last or candidates[position][rank][0] in self._stop_token_ids
            if ends and place < self._beam_width:
                beam = self._extend(position, candidates[position], rank, cumulative_logprob)
                self._finished.append(Hypothesis(beam, self._score(beam)))
            elif not ends and len(running) < self._beam_width:
                running.append(self._extend(position, candidates[position], rank, cumulative_logprob))
        self.running = running
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._beam_width :]

    def best(self, n: int) -> list[Hypothesis]:
        """The `n` best answers, the best first; fewer only if there were not so many continuations."""
        return self._finished[:n]

    def _extend(
        self, position: int, tokens: Sequence[tuple[int, float]], rank: int, cumulative_logprob: float
    ) -> Beam:
        beam = self.running[position]
        token_id, logprob = tokens[rank]
        entry = TokenLogprobs(token_id, logprob, rank + 1, tuple(tokens))
        return Beam((*beam.token_ids, token_id), (*beam.logprobs, entry), cumulative_logprob)

    def _score(self, beam: Beam) -> float:
        score: float = beam.cumulative_logprob / len(beam.token_ids) ** self._length_penalty
        return score

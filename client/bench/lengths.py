"""How long prompts and answers are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.errors import ConfigError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class UniformLength:
    """Every length from `low` to `high`, both included, is as likely; one length if they are the same."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"the lengths {self}: the first has to be at least 1 and not above the second")

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"

    def sample(self, num: int, rng: np.random.Generator) -> IntArray:
        """[num] lengths in tokens."""
        return rng.integers(self.low, self.high + 1, num, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class LognormalLength:
    """Logarithms have a normal distribution: most are short, some are very long.

    `mean` is that of the lengths; `sigma` is the standard deviation of their logarithms.
    """

    mean: float
    sigma: float

    def __str__(self) -> str:
        return f"lognormal, mean {self.mean:g}, sigma {self.sigma:g}"

    def sample(self, num: int, rng: np.random.Generator) -> IntArray:
        """[num] lengths in tokens, at least 1."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        lengths: IntArray = np.maximum(np.rint(rng.lognormal(mu, self.sigma, num)), 1).astype(np.int64)
        return lengths


Length = UniformLength | LognormalLength

# The means of ShareGPT's conversations as the PagedAttention paper gives them (Kwon et al., SOSP 2023,
# figure 11). The shape follows from the medians and 90th percentiles that the Sarathi-Serve paper gives for
# openchat_sharegpt4 (Agrawal et al., OSDI 2024, table 2): sigma = ln(p90 / median) / 1.2816, of prompts
# ln(5696 / 1730) / 1.2816 and of answers ln(834 / 415) / 1.2816.
SHAREGPT_INPUT = LognormalLength(mean=161.31, sigma=0.93)
SHAREGPT_OUTPUT = LognormalLength(mean=337.99, sigma=0.545)


def parse_length(text: str) -> UniformLength:
    """`128`, or `16:256` for uniform lengths from 16 to 256. Raises ConfigError."""
    low, separator, high = text.partition(":")
    try:
        return UniformLength(int(low), int(high if separator else low))
    except ValueError:
        raise ConfigError(f"{text!r} is not a length: give one number, or two as in 16:256") from None


def clip_lengths(inputs: IntArray, outputs: IntArray, max_model_len: int) -> tuple[IntArray, IntArray]:
    """The same lengths, cut so that prompt and answer together fit into `max_model_len`.

    A prompt keeps at least half of the room, an answer at least one token.
    """
    inputs = np.minimum(inputs, np.maximum(max_model_len - outputs, max_model_len // 2))
    return inputs, np.minimum(outputs, max_model_len - inputs)

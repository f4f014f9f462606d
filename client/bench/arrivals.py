"""When requests are sent: at a rate, whatever the server does, or as soon as one before has ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests arrive at `rate` a second on average; infinity sends all of them at once.

    Gaps have the gamma distribution of shape `burstiness` and mean 1 / rate: 1 is a Poisson process,
    below 1 is burstier, above 1 is more regular (the coefficient of variation is burstiness ** -0.5).
    """

    rate: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"the request rate is {self.rate:g}: it has to be above 0")
        if not (self.burstiness > 0 and math.isfinite(self.burstiness)):
            raise ConfigError(f"the burstiness is {self.burstiness:g}: it has to be finite and above 0")

    @property
    def label(self) -> str:
        """What a run with it is called."""
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s"
        return rate if self.burstiness == 1 else f"{rate}, burstiness {self.burstiness:g}"

    def arrival_times_s(self, num_requests: int, seed: int) -> npt.NDArray[np.float64]:
        """[num_requests]: seconds after the start at which each is sent, the first one at 0."""
        if math.isinf(self.rate):
            return np.zeros(num_requests)
        scale = 1 / (self.rate * self.burstiness)
        gaps = np.random.default_rng(seed).gamma(self.burstiness, scale, num_requests - 1)
        return np.concatenate([[0.0], np.cumsum(gaps)])


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` users, each of whom sends the next request when the one before has ended."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"the concurrency is {self.concurrency}: it has to be at least 1")

    @property
    def label(self) -> str:
        """What a run with it is called."""
        return f"concurrency {self.concurrency}"


Load = OpenLoop | ClosedLoop


def parse_loads(request_rate: float | None, burstiness: float, concurrency: str | None) -> list[Load]:
    """The loads that a command line asks for; `concurrency` is one number or several with commas between.

    Raises ConfigError.
    """
    if request_rate is not None:
        if concurrency is not None:
            raise ConfigError("--request-rate and --concurrency exclude each other")
        return [OpenLoop(request_rate, burstiness)]
    if burstiness != 1:
        raise ConfigError("--burstiness needs --request-rate: it is about the gaps between arrivals")
    try:
        numbers = [int(number) for number in (concurrency or "1").split(",")]
    except ValueError:
        raise ConfigError(f"--concurrency {concurrency!r}: give a number, or several as in 1,2,4,8") from None
    return [ClosedLoop(number) for number in numbers]

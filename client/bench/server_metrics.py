"""What the server counted itself during a run: the difference of two readings of its metrics port."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from trtforge.errors import ConfigError, ServerError

PREFIX = "trtforge_"
TIMEOUT_S = 5.0
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*(?:\{.*\})?)\s+(\S+)(?:\s+-?\d+)?$")
_HISTOGRAM_PARTS = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True, slots=True)
class Reading:
    """Values by series, a name with its labels, and the kinds of metrics by name."""

    values: Mapping[str, float]
    kinds: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ServerMetric:
    """One series before and after a run; `change` is what it counted in between, None for a gauge."""

    series: str
    kind: str
    before: float
    after: float

    @property
    def change(self) -> float | None:
        """After less before; counters start at 0 when they first appear."""
        return None if self.kind == "gauge" else self.after - self.before


def read_metrics(url: str) -> Reading:
    """All series of `url` that start with trtforge_. Raises ConfigError or ServerError."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"the metrics URL {url!r} does not start with http:// or https://")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as response:
            return parse_metrics(response.read().decode())
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ServerError(f"no metrics at {url}: {reason}") from error


def parse_metrics(text: str) -> Reading:
    """Prometheus' text format."""
    values, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith(f"# TYPE {PREFIX}"):
            _, _, name, kind = line.split(maxsplit=3)
            kinds[name] = kind
        elif line.startswith(PREFIX) and (sample := _SAMPLE.match(line)):
            values[sample[1]] = float(sample[2])
    return Reading(values, kinds)


def compare(before: Reading, after: Reading) -> list[ServerMetric]:
    """Every series of the later reading."""
    return [
        ServerMetric(series, _kind(series, after.kinds), before.values.get(series, 0.0), value)
        for series, value in sorted(after.values.items())
    ]


def _kind(series: str, kinds: Mapping[str, str]) -> str:
    name = series.partition("{")[0]
    return kinds.get(name) or kinds.get(_HISTOGRAM_PARTS.sub("", name)) or "untyped"

"""Metrics among Triton's own, on its Prometheus port."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import triton_python_backend_utils as pb_utils

from trtforge.runtime.observability.metrics import Instrument


class TritonMetrics:
    """Publishes instruments as Triton's custom metrics, labelled with the model's name."""

    def __init__(self, model_name: str, instruments: Iterable[Instrument]) -> None:
        # The families are kept: Triton drops the metrics of one that nothing refers to.
        self._families: dict[str, Any] = {}
        self._published = []
        for instrument in instruments:
            metrics = [
                self._family(series.name, instrument).Metric(labels={"model": model_name, **series.labels})
                for series in instrument.series()
            ]
            self._published.append(_Published(instrument, metrics))

    def publish(self) -> None:
        """Bring Triton's metrics up to date. Each value that has changed costs a message to the server,
        some 25 µs."""
        for published in self._published:
            published.update()

    def _family(self, name: str, instrument: Instrument) -> Any:
        if name not in self._families:
            kinds = pb_utils.MetricFamily
            self._families[name] = pb_utils.MetricFamily(
                name=name,
                description=instrument.description,
                kind=kinds.COUNTER if instrument.is_counter else kinds.GAUGE,
            )
        return self._families[name]


class _Published:
    """An instrument, and what Triton has of it."""

    def __init__(self, instrument: Instrument, metrics: list[Any]) -> None:
        self._instrument = instrument
        self._metrics = metrics
        self._values = [0.0] * len(metrics)

    def update(self) -> None:
        for position, value in enumerate(self._instrument.values()):
            published = self._values[position]
            if value != published:
                metric = self._metrics[position]
                if self._instrument.is_counter:
                    metric.increment(value - published)
                else:
                    metric.set(value)
                self._values[position] = value

"""How far TensorRT's builder is, out of the nested phases that it reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Phase:
    parent: str | None
    num_steps: int
    num_done: int = 0


class BuildPhases:
    """The phases that are running. Names are unique among those that run at the same time.

    `fraction` says how much of the outermost one is done, 0 to 1, and never falls.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self.fraction = 0.0

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        """A phase of `num_steps` steps begins, within a step of `parent`."""
        self._phases[name] = _Phase(parent, max(num_steps, 1))

    def step(self, name: str, step: int) -> None:
        """Step number `step`, from 0, of the phase is done."""
        self._phases[name].num_done = step + 1
        fraction, share, parent = 0.0, 1.0, None
        while (child := self._last_child(parent)) is not None:
            phase = self._phases[child]
            fraction += share * phase.num_done / phase.num_steps
            share /= phase.num_steps
            parent = child
        self.fraction = max(self.fraction, min(fraction, 1.0))

    def finish(self, name: str) -> None:
        """The phase is over, whether all of its steps were done or not."""
        del self._phases[name]

    @property
    def innermost(self) -> str:
        """The name of the phase that began last; empty outside of all phases."""
        return next(reversed(self._phases), "")

    def _last_child(self, parent: str | None) -> str | None:
        """Of phases side by side the one that began last counts."""
        return next((name for name in reversed(self._phases) if self._phases[name].parent == parent), None)

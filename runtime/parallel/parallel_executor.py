"""Executes a model whose parts are on several ranks, each in a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import DeviceError, ServerError, TrtforgeError
from trtforge.manifest import Manifest
from trtforge.runtime.executor import KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.step_checks import check_step
from trtforge.runtime.parallel.messages import Agreed, FromRank, Load, Meet, Met, Moves, Planned
from trtforge.runtime.parallel.placement import Placement, place_here
from trtforge.runtime.parallel.rank_group import RankGroup
from trtforge.runtime.scheduling.block_moves import BlockMoves

logger = logging.getLogger(__name__)

# Of the time after which the engine ends itself without a reason: so the reason is known before.
_LIMIT_FRACTION = 0.9


class ParallelExecutor:
    """Tells all ranks each step, and returns the logits that those of the last stage write.

    Whatever goes wrong in a rank is a DeviceError, after which no process of the group is left. Ranks also
    end with the thread that makes the executor.
    """

    def __init__(
        self,
        model_dir: Path,
        manifest: Manifest,
        options: EngineOptions,
        on_failure: Callable[[TrtforgeError], None] | None = None,
    ) -> None:
        """Start the ranks, which load their parts of the model in `model_dir`. Once they are loaded,
        `on_failure` is called, in another thread, if one of them dies; the next step fails in any case.

        Raises what a rank raises, with its number: ConfigError for what cannot work, CapacityError for a lack
        of memory, DeviceError for the rest.
        """
        self._vocab_size = manifest.model.vocab_size
        self._limit_s = _LIMIT_FRACTION * options.step_timeout_s
        placement = _place(manifest, options)
        self._steps = placement.steps
        self._ranks = RankGroup(placement.handles, placement.signals)
        self._is_closed = False
        load = Load(
            str(model_dir),
            manifest.model_dump_json(),
            options.model_dump_json(),
            list(placement.nodes),
            list(placement.devices),
            None if placement.signals else _meeting(placement.host, self._ranks.ask(Meet())),
        )
        planned = self._ranks.ask(load)
        agreed = _agree(planned)
        self._ranks.ask(agreed)
        self._spec = KVCacheSpec(manifest.kv_cache.block_size, agreed.num_blocks, agreed.num_host_blocks)
        if on_failure is not None:
            self._ranks.watch(on_failure)
        logger.info(
            "%d tensor-parallel ranks in each of %d pipeline stages, processes %s: %s",
            manifest.tp_size,
            manifest.pp_size,
            self._ranks.pids,
            self._spec,
        )

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._ranks.pids

    def kv_cache_spec(self) -> KVCacheSpec:
        """The cache that every rank has for its layers and heads."""
        return self._spec

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move blocks in all ranks. Raises DeviceError."""
        self._check_open()
        self._ranks.ask(Moves(moves.swap_out, moves.swap_in, moves.copies), self._limit_s)

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Run one step in all ranks.

        Raises ValueError, before any rank hears of it, for inputs that contradict each other, point outside
        the cache or the vocabulary, or make a larger step than the model's limits allow; DeviceError, with
        the rank's own words, if one of them fails.
        """
        self._check_open()
        check_step(inputs, self._spec, self._vocab_size)
        step = self._steps.write(inputs)
        answers = self._ranks.ask(step, self._limit_s)
        return ModelOutputs(logits=self._steps.logits(step, answers))

    def close(self) -> None:
        """End the ranks."""
        self._is_closed = True
        self._ranks.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ServerError("the executor is closed")


def _place(manifest: Manifest, options: EngineOptions) -> Placement:
    if options.executor == "local":
        return place_here(manifest)
    from trtforge.runtime.parallel.ray_placement import place_with_ray

    return place_with_ray(manifest)


def _meeting(host: str, answers: list[FromRank]) -> tuple[str, int]:
    """The host and the port that the first rank has opened."""
    first = answers[0]
    if not isinstance(first, Met):
        raise DeviceError(f"rank 0 said {type(first).__name__}, not where ranks meet")
    return host, first.port


def _agree(planned: list[FromRank]) -> Agreed:
    """As many blocks as the rank with the least room has."""
    plans = [plan for plan in planned if isinstance(plan, Planned)]
    if len(plans) < len(planned):
        raise DeviceError(f"ranks said {planned}, not how many blocks they have room for")
    return Agreed(
        num_blocks=min(plan.num_blocks for plan in plans),
        num_host_blocks=min(plan.num_host_blocks for plan in plans),
    )

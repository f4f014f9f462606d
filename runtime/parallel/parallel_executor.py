"""Executes a model whose parts are on several ranks, each in a process of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from trtforge.engine_options import EngineOptions
from trtforge.errors import DeviceError, ServerError, TrtforgeError
from trtforge.manifest import Manifest
from trtforge.runtime.executor import KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.step_checks import check_step
from trtforge.runtime.parallel.group_memory import GroupMemory
from trtforge.runtime.parallel.messages import Agreed, FromRank, Load, Moves, Planned, Step
from trtforge.runtime.parallel.rank_group import RankGroup
from trtforge.runtime.parallel.rank_view import share_threads
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
        memory, fd = GroupMemory.create(manifest)
        self._steps = memory.steps
        try:
            self._ranks = RankGroup(memory.shape.num_ranks, fd, memory.signals)
        finally:
            os.close(fd)
        self._is_closed = False
        options = share_threads(options, memory.shape.num_ranks)
        load = Load(str(model_dir), manifest.model_dump_json(), options.model_dump_json())
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
        sizes = self._steps.write(inputs)
        self._ranks.ask(Step(sizes), self._limit_s)
        return ModelOutputs(logits=self._steps.logits(sizes.R))

    def close(self) -> None:
        """End the ranks."""
        self._is_closed = True
        self._ranks.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ServerError("the executor is closed")


def _agree(planned: list[FromRank]) -> Agreed:
    """As many blocks as the rank with the least room has."""
    plans = [plan for plan in planned if isinstance(plan, Planned)]
    if len(plans) < len(planned):
        raise DeviceError(f"ranks said {planned}, not how many blocks they have room for")
    return Agreed(
        num_blocks=min(plan.num_blocks for plan in plans),
        num_host_blocks=min(plan.num_host_blocks for plan in plans),
    )

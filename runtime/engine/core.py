"""The engine core: requests in, tokens out, one step at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from trtforge.engine_options import EngineOptions
from trtforge.errors import DeviceError, RequestError
from trtforge.manifest import Limits
from trtforge.runtime.engine.model_inputs import build_model_inputs
from trtforge.runtime.engine.new_sequences import NewSequences
from trtforge.runtime.engine.open_requests import OpenRequest, OpenRequests
from trtforge.runtime.engine.step_results import StepResults
from trtforge.runtime.executor import Executor, ModelInputs, ModelOutputs
from trtforge.runtime.outputs import EngineOutput, EngineStats
from trtforge.runtime.request import EngineRequest
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheConfig, KVCacheManager
from trtforge.runtime.scheduling.schedule import SchedulerLimits, SchedulerOutput
from trtforge.runtime.scheduling.scheduler import Scheduler
from trtforge.runtime.scheduling.speculation import Drafter, PromptLookup

if TYPE_CHECKING:
    from trtforge.runtime.sampling.grammar import CompiledGrammar

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _StepInFlight:
    """A step that the executor works on."""

    scheduled: SchedulerOutput
    num_logits: int
    future: Future[tuple[ModelOutputs, float]]


class EngineCore:
    """Runs all requests on one executor, which it does not close. Not thread-safe.

    While the executor runs a step, the next one is scheduled, on the assumption that each sequence goes on;
    those that did not are taken out before it is launched. A sequence's next token is not known then: a
    placeholder at the end of its tokens stands for it.
    """

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        eos_token_ids: tuple[int, ...],
        vocab_size: int,
        options: EngineOptions | None = None,
        *,
        window: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`window`: tokens that the layer with the longest view sees; None: all. `clock` gives seconds.

        Raises ConfigError if the executor's cache can't hold one sequence of max_model_len tokens.
        """
        options = options or EngineOptions()
        spec = executor.kv_cache_spec()
        self._executor = executor
        self._options = options
        self._clock = clock
        self._block_size = spec.block_size
        self._vocab_size = vocab_size
        self._new_sequences = NewSequences(vocab_size, limits.max_model_len, eos_token_ids)
        self._kv_cache = KVCacheManager(
            KVCacheConfig(
                spec.num_blocks, spec.block_size, spec.num_host_blocks, options.prefix_caching, window
            )
        )
        self._scheduler = Scheduler(
            self._kv_cache,
            SchedulerLimits(
                max_model_len=limits.max_model_len,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_queue_size=options.max_queue_size,
                reserves_blocks=options.scheduler_policy == "guaranteed_no_evict",
                swaps=options.preemption_mode == "swap",
            ),
        )
        self._drafter: Drafter | None = None
        if options.speculative_tokens:
            self._drafter = PromptLookup(options.speculative_ngram)
        self._requests = OpenRequests()
        self._results = StepResults(vocab_size, self._scheduler, self._kv_cache, self._requests)
        self._arrivals = itertools.count()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="executor")
        self._in_flight: _StepInFlight | None = None
        self._step_stats = EngineStats()

    # ------------------------------------------------------------------ what can be seen of it

    @property
    def num_running(self) -> int:
        """Sequences that have tokens in the cache."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences not started yet or preempted."""
        return self._scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        """How often a sequence had to give its blocks back before it was finished."""
        return self._scheduler.num_preemptions

    @property
    def num_free_blocks(self) -> int:
        """Cache blocks that no sequence holds."""
        return self._kv_cache.num_free_blocks

    @property
    def stats(self) -> EngineStats:
        """How busy the core is now, and what the last step took."""
        return msgspec.structs.replace(
            self._step_stats,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_blocks=self._kv_cache.num_blocks,
            num_free_blocks=self.num_free_blocks,
            num_cached_blocks=self._kv_cache.num_cached_blocks,
            num_preemptions=self.num_preemptions,
            num_prefix_queries=self._kv_cache.num_prefix_queries,
            num_prefix_hits=self._kv_cache.num_prefix_hits,
            num_swapped_blocks=self._kv_cache.num_swapped_blocks,
            num_draft_tokens=self._results.num_draft_tokens,
            num_accepted_tokens=self._results.num_accepted_tokens,
        )

    @property
    def open_request_ids(self) -> list[str]:
        """Requests that have not ended."""
        return [request.request_id for request in self._requests.values()]

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to give out."""
        return bool(self._requests) or self._in_flight is not None

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is lost or owned twice, or a request got lost."""
        self._scheduler.check_integrity()
        num_answers = sum(len(request.answers) for request in self._requests.values())
        if num_answers != self._scheduler.num_answers:
            raise RuntimeError(
                f"{num_answers} answers are open, the scheduler knows {self._scheduler.num_answers}"
            )

    # ------------------------------------------------------------------ requests

    def add_request(self, request: EngineRequest, grammar: CompiledGrammar | None = None) -> None:
        """Queue a request; its outputs come from `step`. `grammar` is `request.sampling.guided`, compiled.

        Raises RequestError for an id in use, a prompt that is empty, too long or has unknown tokens, and
        sampling parameters out of range; CapacityError if too many requests wait.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is in use: give every request its own")
        sequence = self._new_sequences.make(request, grammar, next(self._arrivals))
        self._scheduler.add(sequence)
        answers = [sequence, *sequence.followers]
        timeout_s = request.timeout_s or 0.0
        self._requests.add(OpenRequest(request.request_id, answers, self._clock(), timeout_s))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Stop a request now; the next step gives its last output. Unknown and ended ids are ignored.

        With `index` only that answer is stopped, and has no further output; one that has not begun goes on.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        if index is None:
            self._results.finish_all(request)
            self._requests.end_between_steps(EngineOutput(request_id, (), "cancelled"))
            return
        for sequence in request.answers:
            if sequence.index == index and sequence.status != "waiting":
                self._results.finish_answer(sequence)
                return

    def close(self) -> None:
        """Wait for the step in flight; nothing can be done any more then."""
        self._worker.shutdown()

    # ------------------------------------------------------------------ steps

    def step(self) -> list[EngineOutput]:
        """Run one step; returns what it added to the answers, and those that ended since the last one.

        An exception from the executor's `execute` ends the requests of that step with "error" and is not
        raised. A DeviceError is, and what `move_blocks` raises: nothing is known about the cache then.
        """
        started_s = self._clock()
        self._expire(started_s)
        outputs = self._requests.take_last_outputs()
        schedule_s = 0.0
        if self._in_flight is None:
            scheduled = self._schedule()
            schedule_s = self._clock() - started_s
            self._launch(scheduled)
        step = self._in_flight
        if step is None:
            self._step_stats = EngineStats()
            return outputs
        following = None
        if self._drafter is None and self._options.overlap_scheduling:
            overlap_s = self._clock()
            following = self._schedule()
            schedule_s += self._clock() - overlap_s
        new_outputs, executor_s = self._finish(step)
        self._in_flight = None
        if following is not None:
            following.drop_finished()
            self._launch(following)
        self._step_stats = EngineStats(
            step_s=self._clock() - started_s,
            executor_s=executor_s,
            schedule_s=schedule_s,
            num_batched_tokens=sum(step.scheduled.num_scheduled_tokens),
        )
        return outputs + new_outputs

    def _expire(self, now_s: float) -> None:
        for request in self._requests.expired(now_s):
            self._results.finish_all(request)
            problem = f"the request's timeout of {request.timeout_s:g} s has passed"
            if not request.is_scheduled:
                problem += " while it was waiting for its turn"
            self._requests.end_between_steps(
                EngineOutput(request.request_id, (), "error", error=problem, error_kind="timeout")
            )

    def _schedule(self) -> SchedulerOutput:
        if self._drafter is not None:
            self._propose(self._drafter)
        scheduled = self._scheduler.schedule()
        if scheduled.admitted:
            now_s = self._clock()
            for sequence in scheduled.admitted:
                self._requests.note_scheduled(sequence.request_id, now_s)
        return scheduled

    def _propose(self, drafter: Drafter) -> None:
        for sequence in self._scheduler.running:
            if sequence.num_computed_tokens == len(sequence.token_ids) - 1 and not sequence.followers:
                room = sequence.max_num_tokens - len(sequence.token_ids) - 1
                max_tokens = min(self._options.speculative_tokens, room)
                sequence.propose(drafter.propose(sequence.token_ids, max_tokens))

    def _launch(self, scheduled: SchedulerOutput) -> None:
        """Start the executor on a step, if there is anything in it."""
        if scheduled.moves:
            self._executor.move_blocks(scheduled.moves)
        if not scheduled.sequences:
            return
        inputs = build_model_inputs(scheduled, self._block_size)
        for sequence, is_last in zip(scheduled.sequences, scheduled.samples, strict=True):
            if is_last:
                sequence.token_ids.append(0)
        future = self._worker.submit(self._execute, inputs)
        self._in_flight = _StepInFlight(scheduled, len(inputs.logits_indices), future)

    def _execute(self, inputs: ModelInputs) -> tuple[ModelOutputs, float]:
        """In the worker's thread."""
        started_s = time.perf_counter()
        outputs = self._executor.execute(inputs)
        return outputs, time.perf_counter() - started_s

    def _finish(self, step: _StepInFlight) -> tuple[list[EngineOutput], float]:
        try:
            outputs, executor_s = step.future.result()
            if outputs.logits.shape != (step.num_logits, self._vocab_size):
                raise ValueError(
                    f"logits are {outputs.logits.shape}, not {(step.num_logits, self._vocab_size)}"
                )
        except DeviceError:
            raise
        except Exception as error:
            request_ids = {sequence.request_id for sequence in step.scheduled.sequences}
            logger.exception("executor failed; ended requests %s", sorted(request_ids))
            problem = f"the executor failed: {type(error).__name__}: {error}"
            return self._results.fail(step.scheduled.sequences, problem), 0.0
        return self._results.apply(step.scheduled, outputs), executor_s

"""The engine core: requests in, tokens out, one step at a time."""

from __future__ import annotations

import logging

from trtforge.errors import RequestError
from trtforge.manifest import Limits
from trtforge.runtime.executor import Executor
from trtforge.runtime.kv_cache_manager import KVCacheManager
from trtforge.runtime.model_inputs import build_model_inputs
from trtforge.runtime.outputs import EngineOutput, EngineStats
from trtforge.runtime.request import EngineRequest
from trtforge.runtime.sampling.sampler import INVALID_TOKEN, check_sampling_params, sample
from trtforge.runtime.scheduler import Scheduler, SchedulerOutput
from trtforge.runtime.sequence import Sequence

logger = logging.getLogger(__name__)


class EngineCore:
    """Runs all requests on one executor, which it does not close. Not thread-safe."""

    def __init__(
        self, executor: Executor, limits: Limits, eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        """Raises ConfigError if the executor's cache can't hold one sequence of max_model_len tokens."""
        spec = executor.kv_cache_spec()
        self._executor = executor
        self._block_size = spec.block_size
        self._max_model_len = limits.max_model_len
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._kv_cache = KVCacheManager(spec.num_blocks, spec.block_size)
        self._scheduler = Scheduler(
            self._kv_cache,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        self._sequences: dict[str, Sequence] = {}  # until their last output is given out
        self._cancelled: list[Sequence] = []

    @property
    def num_running(self) -> int:
        """Requests that have tokens in the cache."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests not started yet or preempted."""
        return self._scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        """How often a request had to give its blocks back before it was finished."""
        return self._scheduler.num_preemptions

    @property
    def stats(self) -> EngineStats:
        """How busy the core is now."""
        return EngineStats(
            num_running=self.num_running, num_waiting=self.num_waiting, num_free_blocks=self.num_free_blocks
        )

    @property
    def num_free_blocks(self) -> int:
        """Cache blocks that no request holds."""
        return self._kv_cache.num_free_blocks

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request; its outputs come from `step`.

        Raises RequestError for an id in use, a prompt that is empty, too long or has unknown tokens,
        and sampling parameters out of range.
        """
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id!r} is in use: give every request its own")
        self._check_prompt(request.prompt_token_ids)
        check_sampling_params(request.sampling)
        sequence = Sequence.from_request(request, self._eos_token_ids, self._max_model_len)
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Stop a request now; the next step gives its last output. Unknown and ended ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.status != "finished":
            self._scheduler.finish(sequence)
            self._cancelled.append(sequence)

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to give out."""
        return bool(self._sequences)

    def step(self) -> list[EngineOutput]:
        """Run one step; returns at most one output a request.

        An exception from the executor ends the requests of that step with "error"; it is not raised.
        """
        outputs = [EngineOutput(sequence.request_id, (), "cancelled") for sequence in self._cancelled]
        for sequence in self._cancelled:
            del self._sequences[sequence.request_id]
        self._cancelled.clear()

        scheduled = self._scheduler.schedule()
        if scheduled.sequences:
            outputs += self._run(scheduled)
        return outputs

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is lost or owned twice, or a request got lost."""
        self._scheduler.check_integrity()
        num_known = self.num_running + self.num_waiting + len(self._cancelled)
        if num_known != len(self._sequences):
            raise RuntimeError(f"{len(self._sequences)} requests are open, the scheduler knows {num_known}")

    def _check_prompt(self, prompt_token_ids: tuple[int, ...]) -> None:
        if not prompt_token_ids:
            raise RequestError("the prompt is empty; it needs at least one token")
        if len(prompt_token_ids) + 1 > self._max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens; the model takes at most "
                f"{self._max_model_len - 1}, and one to generate"
            )
        for token_id in (min(prompt_token_ids), max(prompt_token_ids)):
            if not 0 <= token_id < self._vocab_size:
                raise RequestError(
                    f"prompt token id {token_id} is not in the vocabulary, 0 to {self._vocab_size - 1}"
                )

    def _run(self, scheduled: SchedulerOutput) -> list[EngineOutput]:
        inputs = build_model_inputs(scheduled, self._block_size)
        sequences = scheduled.sequences
        try:
            logits = self._executor.execute(inputs).logits
            if logits.shape != (len(sequences), self._vocab_size):
                raise ValueError(f"logits are {logits.shape}, not {(len(sequences), self._vocab_size)}")
        except Exception as error:
            request_ids = [sequence.request_id for sequence in sequences]
            logger.exception("executor failed; ended requests %s", request_ids)
            problem = f"the executor failed: {type(error).__name__}: {error}"
            return [self._fail(sequence, problem) for sequence in sequences]
        # Rows of unfinished prefill chunks are sampled too and dropped in _update: at most one a step.
        token_ids = sample(
            logits,
            [sequence.sampling for sequence in sequences],
            [sequence.num_generated_tokens for sequence in sequences],
        )
        return self._update(scheduled, token_ids.tolist())

    def _update(self, scheduled: SchedulerOutput, token_ids: list[int]) -> list[EngineOutput]:
        outputs = []
        for sequence, num_tokens, token_id in zip(
            scheduled.sequences, scheduled.num_scheduled_tokens, token_ids, strict=True
        ):
            if not sequence.advance(num_tokens):
                continue
            if token_id == INVALID_TOKEN:
                outputs.append(self._fail(sequence, "the model's logits are NaN or infinite"))
                continue
            sequence.token_ids.append(token_id)
            finish_reason = sequence.finish_reason()
            if finish_reason is not None:
                self._end(sequence)
            outputs.append(EngineOutput(sequence.request_id, (token_id,), finish_reason))
        return outputs

    def _fail(self, sequence: Sequence, problem: str) -> EngineOutput:
        self._end(sequence)
        return EngineOutput(sequence.request_id, (), "error", error=problem)

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        del self._sequences[sequence.request_id]

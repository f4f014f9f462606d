"""From a step's logits to new tokens, ended answers and outputs."""

from __future__ import annotations

from collections.abc import Iterable

from trtforge.runtime.engine.model_inputs import num_logits
from trtforge.runtime.engine.open_requests import OpenRequest, OpenRequests
from trtforge.runtime.executor import Float32Array, ModelOutputs
from trtforge.runtime.outputs import EngineOutput, TokenLogprobs
from trtforge.runtime.request import FinishReason
from trtforge.runtime.sampling.logprobs import prompt_logprobs
from trtforge.runtime.sampling.sampler import INVALID_TOKEN, Sampled, Sampler
from trtforge.runtime.sampling.state import SamplingState
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheManager
from trtforge.runtime.scheduling.schedule import SchedulerOutput
from trtforge.runtime.scheduling.scheduler import Scheduler
from trtforge.runtime.scheduling.sequence import Sequence

_INVALID_LOGITS = "the model's logits are NaN or infinite"

# An answer's new tokens, and their logprobs if it wants them.
_NewTokens = tuple[Sequence, list[int], list[TokenLogprobs | None] | None]


class StepResults:
    """Applies what the executor computed to the sequences, the cache and the open requests."""

    def __init__(
        self, vocab_size: int, scheduler: Scheduler, kv_cache: KVCacheManager, requests: OpenRequests
    ) -> None:
        self._sampler = Sampler(vocab_size)
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._requests = requests
        self.num_draft_tokens = 0  # checked so far
        self.num_accepted_tokens = 0  # of which the model agreed with

    def apply(self, scheduled: SchedulerOutput, outputs: ModelOutputs) -> list[EngineOutput]:
        """Sample, and move on the sequences that have not finished while the step ran.

        For the next token of a sequence that samples a placeholder stands at the end of its tokens.
        """
        results: list[EngineOutput] = []
        if scheduled.is_plain:
            new_tokens = self._sample_one_each(scheduled, outputs, results)
        else:
            new_tokens = self._sample_any(scheduled, outputs, results)
        for sequence, token_ids, logprobs in new_tokens:
            if sequence.status != "finished":
                self._extend(sequence, token_ids, logprobs, results)
        return results

    def _cache_full_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """The first `num_tokens` tokens are computed, and are certain."""
        if sequence.status == "running":
            self._kv_cache.cache_full_blocks(sequence, num_tokens)

    def fail(self, sequences: Iterable[Sequence], problem: str) -> list[EngineOutput]:
        """End the requests of the sequences that have not finished."""
        results: list[EngineOutput] = []
        for sequence in sequences:
            if sequence.status != "finished":
                self._fail(sequence, problem, results)
        return results

    def finish_all(self, request: OpenRequest) -> None:
        """Stop all answers of the request and free their blocks."""
        for sequence in request.answers:
            # Followers that have not forked yet are unknown to the scheduler.
            if sequence.status != "waiting" or sequence.index == request.answers[0].index:
                self._scheduler.finish(sequence)
            sequence.status = "finished"

    def finish_answer(self, sequence: Sequence) -> None:
        """Stop one answer and free its blocks; the request ends with its last one."""
        self._scheduler.finish(sequence)
        self._requests.end_answer(sequence)

    # ------------------------------------------------------------------ sampling

    def _sample_one_each(
        self, scheduled: SchedulerOutput, outputs: ModelOutputs, results: list[EngineOutput]
    ) -> Iterable[_NewTokens]:
        """Row i of the logits belongs to sequence i. Those of unfinished prefills are sampled and dropped.

        Most tokens are nothing but one more: their outputs are made on the spot, and only the others come
        back.
        """
        sequences = scheduled.sequences
        states: list[SamplingState | None] = [None] * len(sequences)
        lengths = [0] * len(sequences)
        for row in scheduled.rows_with_state:
            if scheduled.samples[row]:
                states[row] = sequences[row].sampling_state
                lengths[row] = len(sequences[row].token_ids) - 1
        sampled = self._sampler.sample(outputs.logits, states, lengths, argmax=outputs.argmax)
        logprobs = sampled.logprobs
        block_size = self._kv_cache.block_size
        others: list[_NewTokens] = []
        for row, (sequence, is_last, token_id) in enumerate(
            zip(sequences, scheduled.samples, sampled.token_ids, strict=True)
        ):
            known = sequence.token_ids
            # All tokens before the placeholder are computed, or those up to the chunk's end.
            num_computed = len(known) - 1 if is_last else scheduled.end(row)
            if num_computed >= (sequence.num_cached_blocks + 1) * block_size:
                self._cache_full_blocks(sequence, num_computed)
            if not is_last or sequence.status == "finished":
                continue
            if (
                states[row] is not None
                or token_id < 0
                or token_id in sequence.stop_token_ids
                or num_computed + 1 >= sequence.max_num_tokens
                or num_computed == sequence.num_prompt_tokens
            ):
                others.append((sequence, [token_id], None if logprobs is None else logprobs[row : row + 1]))
                continue
            known[num_computed] = token_id
            results.append(EngineOutput(sequence.request_id, (token_id,), None, sequence.order[2]))
        return others

    def _sample_any(
        self, scheduled: SchedulerOutput, outputs: ModelOutputs, results: list[EngineOutput]
    ) -> Iterable[_NewTokens]:
        """Sequences may have rows for drafts and prompt tokens, and be followed by others."""
        states: list[SamplingState | None] = []
        lengths: list[int] = []
        rows: list[int] = []
        answers: list[tuple[Sequence, int]] = []  # and how many rows are sampled for it
        row = 0
        for sequence, start, num_tokens, is_last in zip(
            scheduled.sequences,
            scheduled.starts,
            scheduled.num_scheduled_tokens,
            scheduled.samples,
            strict=True,
        ):
            self._cache_full_blocks(sequence, start + num_tokens - sequence.num_draft_tokens)
            end = row + num_logits(sequence, num_tokens)
            if sequence.wants_prompt_logprobs and sequence.status != "finished":
                self._give_prompt_logprobs(sequence, start, outputs.logits[row:end], results)
            if is_last and sequence.status != "finished":
                followers = sequence.followers
                if followers:
                    self._fork(sequence, start + num_tokens)
                num_rows = 1 + sequence.num_draft_tokens
                for answer in (sequence, *followers):
                    answers.append((answer, num_rows))
                    states += [answer.sampling_state] * num_rows
                    last = len(sequence.token_ids) - 1
                    lengths += range(last - num_rows + 1, last + 1)
                    rows += range(end - num_rows, end)
            row = end
        if not rows:
            return []
        argmax = outputs.argmax
        sampled = self._sampler.sample(outputs.logits, states, lengths, rows=rows, argmax=argmax)
        return self._check_drafts(answers, sampled)

    def _fork(self, sequence: Sequence, num_tokens: int) -> None:
        followers = sequence.followers
        self._scheduler.fork(sequence, num_tokens)
        for follower in followers:
            follower.token_ids.append(0)

    def _check_drafts(self, answers: list[tuple[Sequence, int]], sampled: Sampled) -> Iterable[_NewTokens]:
        """Keep sampled tokens as long as the drafts before them equal what was sampled.

        Row j was sampled as if the first j drafts had been generated. A draft is accepted if it is the token
        that was drawn in its place, and a rejected one is replaced by what was drawn: exactly what would have
        been generated one by one, whatever the temperature.
        """
        first = 0
        for sequence, num_rows in answers:
            num_drafts = num_rows - 1
            token_ids = sampled.token_ids[first : first + num_rows]
            logprobs = None if sampled.logprobs is None else sampled.logprobs[first : first + num_rows]
            first += num_rows
            if num_drafts:
                drafts = sequence.token_ids[-1 - num_drafts : -1].tolist()
                num_accepted = 0
                while num_accepted < num_drafts and drafts[num_accepted] == token_ids[num_accepted]:
                    num_accepted += 1
                self.num_draft_tokens += num_drafts
                self.num_accepted_tokens += num_accepted
                del sequence.token_ids[-num_drafts:]
                sequence.num_draft_tokens = 0
                sequence.num_computed_tokens -= num_drafts - num_accepted
                token_ids = token_ids[: num_accepted + 1]
                logprobs = None if logprobs is None else logprobs[: num_accepted + 1]
            yield sequence, token_ids, logprobs

    def _give_prompt_logprobs(
        self, sequence: Sequence, start: int, logits: Float32Array, results: list[EngineOutput]
    ) -> None:
        """Row r gives the logprobs of prompt token start + r + 1."""
        first = sequence.num_prompt_logprobs + 1
        end = min(start + 1 + len(logits), sequence.num_prompt_tokens)
        num_top = sequence.sampling.prompt_logprobs
        if first >= end or num_top is None:
            return
        next_token_ids = sequence.token_ids[first:end].tolist()
        logprobs = prompt_logprobs(logits[first - start - 1 : end - start - 1], next_token_ids, num_top)
        sequence.num_prompt_logprobs = end - 1
        results.append(EngineOutput(sequence.request_id, (), prompt_logprobs=logprobs))

    # ------------------------------------------------------------------ what follows from new tokens

    def _extend(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprobs | None] | None,
        results: list[EngineOutput],
    ) -> None:
        """Put the tokens in the placeholder's place, and end the answer where it ends."""
        known = sequence.token_ids
        known.pop()
        num_new = 0
        reason: FinishReason | None = None
        for token_id in token_ids:
            if token_id < 0:  # INVALID_TOKEN or NO_TOKEN
                break
            known.append(token_id)
            num_new += 1
            if token_id in sequence.stop_token_ids:
                reason = "stop"
                break
            if len(known) >= sequence.max_num_tokens:
                reason = "length"
                break
        is_exhausted = reason is None and num_new < len(token_ids)
        if is_exhausted and token_ids[num_new] == INVALID_TOKEN:
            self._kv_cache.forget_prefix(sequence)  # its keys and values are hardly better
            self._fail(sequence, _INVALID_LOGITS, results)
            return
        start = None
        if len(known) - num_new == sequence.num_prompt_tokens and sequence.order[2] == 0:
            start = self._requests.start(sequence.request_id)
        if sequence.sampling_state is not None:
            sequence.sampling_state.accept(num_new)
        if reason is not None or is_exhausted:
            self.finish_answer(sequence)
        results.append(
            EngineOutput(
                sequence.request_id,
                tuple(token_ids[:num_new]),
                reason,
                sequence.order[2],
                logprobs=None if logprobs is None else _given(logprobs[:num_new]),
                start=start,
            )
        )
        if (
            is_exhausted
        ):  # nothing is allowed any more; "stop" with tokens would call the last one a stop token
            results.append(EngineOutput(sequence.request_id, (), "stop", sequence.order[2]))

    def _fail(self, sequence: Sequence, problem: str, results: list[EngineOutput]) -> None:
        request = self._requests.get(sequence.request_id)
        if request is not None:
            self.finish_all(request)
            self._requests.end(sequence.request_id)
            results.append(EngineOutput(sequence.request_id, (), "error", error=problem))


def _given(logprobs: list[TokenLogprobs | None]) -> tuple[TokenLogprobs, ...] | None:
    """Those of an answer that wants them; None for one in whose step others did."""
    return tuple(entry for entry in logprobs if entry is not None) or None

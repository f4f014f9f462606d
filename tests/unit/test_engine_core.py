from __future__ import annotations

import threading
from array import array
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError, DeviceError, RequestError
from trtforge.manifest import Limits
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executor import Float32Array, ModelInputs, ModelOutputs
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.outputs import EngineOutput
from trtforge.runtime.request import EngineRequest, FinishReason, SamplingParams
from trtforge.runtime.sampling.sampler import Sampler
from trtforge.runtime.sampling.state import SamplingState
from trtforge.runtime.scheduling.scheduler import Scheduler, SchedulerOutput

VOCAB_SIZE = 11
EOS = (0,)


def sample_alone(logits: Float32Array, params: SamplingParams, tokens: list[int], num_prompt: int) -> int:
    state = SamplingState(params, array("i", tokens), num_prompt, frozenset(), None)
    return Sampler(VOCAB_SIZE).sample(logits, [state], [len(tokens)]).token_ids[0]


@cache
def naive_executor(max_model_len: int, window: int | None) -> FakeExecutor:
    return FakeExecutor(VOCAB_SIZE, num_blocks=1, block_size=max_model_len, window=window)


@cache
def naive_generate(
    prompt: tuple[int, ...],
    params: SamplingParams,
    max_model_len: int,
    *,
    index: int = 0,
    window: int | None = None,
) -> tuple[tuple[int, ...], FinishReason]:
    """One answer alone: the whole prompt in one step, one large block, inputs written out by hand."""
    executor = naive_executor(max_model_len, window)
    if params.seed is not None:
        params = replace(params, seed=params.seed | index << 64)
    stop = set(params.stop_token_ids) | (set() if params.ignore_eos else set(EOS))
    tokens, num_computed = list(prompt), 0
    while True:
        positions = np.arange(num_computed, len(tokens), dtype=np.int32)
        inputs = ModelInputs(
            input_ids=np.array(tokens[num_computed:], dtype=np.int32),
            position_ids=positions,
            block_tables=np.zeros((1, 1), dtype=np.int32),
            cu_seqlens=np.array([0, len(positions)], dtype=np.int32),
            context_lens=np.array([len(tokens)], dtype=np.int32),
            slot_mapping=positions,
            logits_indices=np.array([len(positions) - 1], dtype=np.int32),
        )
        num_computed = len(tokens)
        position = len(tokens) - len(prompt)
        tokens.append(sample_alone(executor.execute(inputs).logits, params, tokens, len(prompt)))
        if tokens[-1] in stop:
            return tuple(tokens[len(prompt) :]), "stop"
        if position + 1 == params.max_tokens or len(tokens) == max_model_len:
            return tuple(tokens[len(prompt) :]), "length"


class RecordingExecutor(FakeExecutor):
    """Remembers the size of every step."""

    def __init__(self, num_blocks: int, block_size: int, **options: Any) -> None:
        super().__init__(VOCAB_SIZE, num_blocks, block_size, **options)
        self.num_tokens: list[int] = []
        self.num_seqs: list[int] = []

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        self.num_tokens.append(len(inputs.input_ids))
        self.num_seqs.append(len(inputs.context_lens))
        return super().execute(inputs)


def new_core(
    executor: FakeExecutor,
    options: EngineOptions | None = None,
    *,
    max_model_len: int = 64,
    max_num_seqs: int = 8,
    budget: int = 64,
    **others: Any,
) -> EngineCore:
    limits = Limits(max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    return EngineCore(executor, limits, EOS, VOCAB_SIZE, options, **others)


def run_to_end(core: EngineCore) -> list[EngineOutput]:
    outputs = []
    for _ in range(10_000):
        if not core.has_work():
            return outputs
        outputs += core.step()
        core.check_integrity()
    pytest.fail("the engine core does not finish")


def tokens_of(
    outputs: list[EngineOutput], request_id: str, index: int = 0
) -> tuple[tuple[int, ...], FinishReason | None]:
    """All tokens of an answer and its finish reason, which has to come with the last output and no other."""
    own = [o for o in outputs if o.request_id == request_id and o.index == index]
    # A cancelled request has one last output, of answer 0, which may have ended before.
    ends = [output.finish_reason for output in own if output.finish_reason not in (None, "cancelled")]
    assert len(ends) <= 1
    token_ids = tuple(token_id for output in own for token_id in output.token_ids)
    return token_ids, own[-1].finish_reason if own else None


def greedy(request_id: str, prompt: tuple[int, ...], max_tokens: int = 8) -> EngineRequest:
    return EngineRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    seed=st.integers(0, 5),
    stop_token_ids=st.sampled_from([(), (3,)]),
    ignore_eos=st.booleans(),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    logprobs=st.sampled_from([None, None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
)

engine_options = st.builds(
    EngineOptions,
    prefix_caching=st.booleans(),
    scheduler_policy=st.sampled_from(["max_utilization", "max_utilization", "guaranteed_no_evict"]),
    preemption_mode=st.sampled_from(["recompute", "swap"]),
    overlap_scheduling=st.booleans(),
    speculative_tokens=st.sampled_from([0, 0, 3]),
    speculative_ngram=st.just(2),
)


class EngineMachine(RuleBasedStateMachine):
    """Requests of all kinds arrive, run and are cancelled at random, on caches small enough to preempt.

    However the engine is set, each answer's tokens are those that its request gets alone.
    """

    @initialize(
        block_size=st.integers(1, 5),
        max_model_len=st.integers(4, 24),
        num_spare_blocks=st.integers(0, 10),
        num_host_blocks=st.sampled_from([0, 4, 20]),
        window=st.sampled_from([None, None, 2, 6]),
        max_num_seqs=st.integers(3, 6),
        budget=st.integers(1, 12),
        options=engine_options,
    )
    def build(
        self,
        block_size: int,
        max_model_len: int,
        num_spare_blocks: int,
        num_host_blocks: int,
        window: int | None,
        max_num_seqs: int,
        budget: int,
        options: EngineOptions,
    ) -> None:
        self.num_blocks = -(-max_model_len // block_size) + num_spare_blocks
        self.max_model_len, self.max_num_seqs, self.budget = max_model_len, max_num_seqs, budget
        self.window = window
        self.executor = RecordingExecutor(
            self.num_blocks, block_size, num_host_blocks=num_host_blocks, window=window
        )
        self.core = new_core(
            self.executor,
            options,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            budget=budget,
            window=window,
        )
        self.requests: dict[str, EngineRequest] = {}
        self.cancelled: set[str] = set()
        self.outputs: list[EngineOutput] = []

    @rule(
        data=st.data(),
        params=sampling_params,
        priority=st.sampled_from([0, 0, 1, -1]),
        salt=st.sampled_from(["", "x"]),
    )
    def arrive(self, data: st.DataObject, params: SamplingParams, priority: int, salt: str) -> None:
        tokens = st.one_of(st.just(1), st.integers(0, VOCAB_SIZE - 1))  # prompts that begin alike
        prompt = data.draw(st.lists(tokens, min_size=1, max_size=self.max_model_len - 1))
        request = EngineRequest(str(len(self.requests)), tuple(prompt), params, priority, cache_salt=salt)
        try:
            self.core.add_request(request)
        except RequestError:  # answers that guaranteed_no_evict can never run together
            assert params.n > 1
        else:
            self.requests[request.request_id] = request

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            outputs = self.core.step()
            self.core.check_integrity()
            self.outputs += outputs
            with_tokens = [(output.request_id, output.index) for output in outputs if output.token_ids]
            assert len(set(with_tokens)) == len(with_tokens)

    @precondition(lambda self: self.requests)
    @rule(index=st.integers(0))
    def cancel(self, index: int) -> None:
        request_id = str(index % len(self.requests))
        if request_id in self.core.open_request_ids:
            self.cancelled.add(request_id)
        self.core.cancel(request_id)

    @invariant()
    def limits_are_kept(self) -> None:
        assert max(self.executor.num_tokens, default=0) <= self.budget
        assert max(self.executor.num_seqs, default=0) <= self.max_num_seqs
        self.core.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        self.outputs += run_to_end(self.core)
        self.core.close()
        assert self.core.num_free_blocks == self.num_blocks
        for request_id, request in self.requests.items():
            reasons = [o.finish_reason for o in self.outputs if o.request_id == request_id]
            for index in range(request.sampling.n):
                expected = naive_generate(
                    request.prompt_token_ids,
                    request.sampling,
                    self.max_model_len,
                    index=index,
                    window=self.window,
                )
                token_ids, finish_reason = tokens_of(self.outputs, request_id, index)
                if request_id in self.cancelled:
                    assert "cancelled" in reasons
                    assert token_ids == expected[0][: len(token_ids)]
                else:
                    assert (token_ids, finish_reason) == expected
                self.check_logprobs(request, index, token_ids)

    def check_logprobs(self, request: EngineRequest, index: int, token_ids: tuple[int, ...]) -> None:
        """One entry a token, of this token; of the prompt all but the first."""
        own = [o for o in self.outputs if o.request_id == request.request_id and o.index == index]
        found = [entry.token_id for output in own for entry in output.logprobs or ()]
        assert found == ([] if request.sampling.logprobs is None else list(token_ids))
        prompt = [entry.token_id for output in own for entry in output.prompt_logprobs or ()]
        wanted = list(request.prompt_token_ids[1:])
        if request.sampling.prompt_logprobs is None or index:
            assert not prompt
        elif token_ids:
            assert prompt == wanted


TestEngineCore = EngineMachine.TestCase
TestEngineCore.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_preemption_recomputes_and_changes_nothing() -> None:
    max_model_len = 40
    executor = RecordingExecutor(num_blocks=10, block_size=4)
    core = new_core(executor, max_model_len=max_model_len, budget=6)
    requests = [
        EngineRequest(
            str(n),
            tuple(range(1, 2 + n)),
            SamplingParams(max_tokens=30, temperature=0.8 * (n % 2), seed=n, ignore_eos=True),
        )
        for n in range(6)
    ]
    for request in requests:
        core.add_request(request)
    outputs = run_to_end(core)
    for request in requests:
        expected = naive_generate(request.prompt_token_ids, request.sampling, max_model_len)
        assert tokens_of(outputs, request.request_id) == expected
    # The last token of a request is never fed back: more than the others means recomputed.
    assert sum(executor.num_tokens) > sum(len(r.prompt_token_ids) + 29 for r in requests)


def test_a_request_ends_at_max_model_len_with_reason_length() -> None:
    core = new_core(FakeExecutor(VOCAB_SIZE, 3, 4), max_model_len=12)
    core.add_request(greedy("a", tuple(range(11)), max_tokens=500))
    core.add_request(greedy("b", (1, 2), max_tokens=10**12))
    outputs = run_to_end(core)
    for request_id, num_tokens in (("a", 1), ("b", 10)):
        token_ids, finish_reason = tokens_of(outputs, request_id)
        assert (len(token_ids), finish_reason) == (num_tokens, "length")


def test_stop_tokens_end_a_request_and_are_given_out() -> None:
    prompt = (1, 2, 3)
    free = naive_generate(prompt, SamplingParams(max_tokens=40, ignore_eos=True), 64)[0]
    assert EOS[0] in free, "a prompt whose continuation has the end-of-sequence token"
    other = next(token for token in free[2:] if token != EOS[0])
    core = new_core(FakeExecutor(VOCAB_SIZE, 100, 4))
    for request_id, params, last in (
        ("eos", SamplingParams(max_tokens=40), EOS[0]),
        ("listed", SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(other,)), other),
    ):
        core.add_request(EngineRequest(request_id, prompt, params))
        expected = free[: free.index(last) + 1]
        assert tokens_of(run_to_end(core), request_id) == (expected, "stop")


def test_bad_requests_are_refused_and_leave_nothing_behind() -> None:
    core = new_core(FakeExecutor(VOCAB_SIZE, 100, 4), max_model_len=10)
    core.add_request(greedy("a", (1, 2)))
    for request, message in (
        (greedy("a", (3,)), "request id 'a' is in use"),
        (greedy("b", ()), "the prompt is empty"),
        (greedy("b", (1,) * 10), "the prompt has 10 tokens; the model takes at most 9"),
        (greedy("b", (1, 11, 2)), "prompt token id 11 is not in the vocabulary, 0 to 10"),
        (greedy("b", (1, -1, 2)), "prompt token id -1 is not in the vocabulary"),
        (greedy("b", (2**40,)), "prompt token id 1099511627776 is not"),
        (greedy("b", (1,), max_tokens=0), "max_tokens is 0"),
    ):
        with pytest.raises(RequestError, match=message):
            core.add_request(request)
        core.check_integrity()
    assert {output.request_id for output in run_to_end(core)} == {"a"}
    core.add_request(greedy("a", (3,)))  # free again


def test_a_cache_too_small_for_max_model_len_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len 64"):
        new_core(FakeExecutor(VOCAB_SIZE, num_blocks=15, block_size=4), max_model_len=64)


def test_cancelling_frees_blocks_at_once_and_reports_in_the_next_step() -> None:
    core = new_core(FakeExecutor(VOCAB_SIZE, 100, 4), max_num_seqs=1)
    core.add_request(greedy("running", (1, 2, 3)))
    core.add_request(greedy("waiting", (1, 2)))
    core.step()
    core.cancel("unknown")
    for request_id in ("running", "waiting", "running"):
        core.cancel(request_id)
    assert core.num_free_blocks == 100
    assert core.has_work()
    with pytest.raises(RequestError, match="in use"):
        core.add_request(greedy("running", (1,)))
    assert core.step() == [
        EngineOutput("running", (), "cancelled"),
        EngineOutput("waiting", (), "cancelled"),
    ]
    assert not core.has_work()
    assert core.step() == []


class PoisoningExecutor(FakeExecutor):
    """Gives NaN to sequences whose context has a certain length."""

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        outputs = super().execute(inputs)
        poisoned = inputs.context_lens == 7
        outputs.logits[poisoned, 5] = np.nan
        return ModelOutputs(outputs.logits, np.where(poisoned, -1, outputs.argmax).astype(np.int32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_end_their_request_only(temperature: float) -> None:
    core = new_core(PoisoningExecutor(VOCAB_SIZE, 100, 4))
    params = SamplingParams(max_tokens=5, temperature=temperature, seed=1, ignore_eos=True)
    prompts = {"alone at 7": (4, 5, 6, 7, 8), "short": (1,), "long": (2,) * 9, "chunk end": (3,) * 30}
    for request_id, prompt in prompts.items():
        core.add_request(EngineRequest(request_id, prompt, params))
    outputs = run_to_end(core)
    expected = {request_id: naive_generate(prompt, params, 64) for request_id, prompt in prompts.items()}
    for request_id in ("short", "long", "chunk end"):
        assert tokens_of(outputs, request_id) == expected[request_id]
    assert tokens_of(outputs, "alone at 7") == (expected["alone at 7"][0][:2], "error")
    assert [output.error for output in outputs if output.error] == ["the model's logits are NaN or infinite"]
    assert core.num_free_blocks == 100


class FailingExecutor(FakeExecutor):
    """Raises in its third step."""

    num_steps = 0
    error: Exception = MemoryError("out of device memory")

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        self.num_steps += 1
        if self.num_steps == 3:
            raise self.error
        return super().execute(inputs)


def test_an_executor_failure_ends_the_requests_of_that_step_only() -> None:
    core = new_core(FailingExecutor(VOCAB_SIZE, 100, 4), max_num_seqs=2)
    prompts = {str(n): (n, n + 1) for n in range(1, 5)}
    for request_id, prompt in prompts.items():
        core.add_request(greedy(request_id, prompt))
    outputs = run_to_end(core)
    for request_id, prompt in prompts.items():
        expected, _ = naive_generate(prompt, greedy("", prompt).sampling, 64)
        failed = request_id in ("1", "2")
        token_ids, finish_reason = tokens_of(outputs, request_id)
        assert finish_reason == ("error" if failed else "length")
        assert token_ids == (expected[:2] if failed else expected)
    errors = {output.error for output in outputs if output.finish_reason == "error"}
    assert errors == {"the executor failed: MemoryError: out of device memory"}
    assert core.num_free_blocks == 100


def test_a_device_error_is_not_survived() -> None:
    executor = FailingExecutor(VOCAB_SIZE, 100, 4)
    executor.error = DeviceError("an illegal memory access")
    core = new_core(executor)
    core.add_request(greedy("a", (1, 2)))
    with pytest.raises(DeviceError, match="illegal memory access"):
        run_to_end(core)


def test_logits_of_another_vocabulary_are_an_executor_failure() -> None:
    core = new_core(FakeExecutor(VOCAB_SIZE + 1, 100, 4))
    core.add_request(greedy("a", (1,)))
    (output,) = core.step()
    assert output.finish_reason == "error"
    assert "logits are (1, 12), not (1, 11)" in (output.error or "")


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_timeouts_end_requests_whether_they_wait_or_run() -> None:
    clock = Clock()
    core = new_core(FakeExecutor(VOCAB_SIZE, 100, 4), max_num_seqs=1, clock=clock)
    core.add_request(replace(greedy("runs", (1, 2), 50), timeout_s=2.0))
    core.add_request(replace(greedy("waits", (1, 2), 50), timeout_s=1.0))
    core.add_request(greedy("patient", (1, 2), 2))
    outputs = []
    for clock.now_s in (100.0, 100.9, 101.0, 101.9, 102.0):
        outputs += core.step()
        core.check_integrity()
    errors = {output.request_id: (output.error, output.error_kind) for output in outputs if output.error}
    assert errors == {
        "waits": ("the request's timeout of 1 s has passed while it was waiting for its turn", "timeout"),
        "runs": ("the request's timeout of 2 s has passed", "timeout"),
    }
    outputs += run_to_end(core)
    assert tokens_of(outputs, "patient")[1] == "length"
    # The id can be used again, and the old deadline is not the new request's.
    core.add_request(replace(greedy("runs", (1, 2), 2), timeout_s=60.0))
    clock.now_s += 9.0
    assert tokens_of(run_to_end(core), "runs")[1] == "length"


def test_a_full_queue_refuses_and_leaves_nothing_behind() -> None:
    core = new_core(FakeExecutor(VOCAB_SIZE, 100, 4), EngineOptions(max_queue_size=1), max_num_seqs=1)
    core.add_request(greedy("a", (1,)))
    with pytest.raises(CapacityError, match="1 requests are waiting"):
        core.add_request(greedy("b", (1,)))
    core.check_integrity()
    assert {output.request_id for output in run_to_end(core)} == {"a"}


def test_one_answer_of_several_can_be_stopped() -> None:
    core = new_core(FakeExecutor(VOCAB_SIZE, 100, 4))
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=3, ignore_eos=True)
    core.add_request(EngineRequest("a", (1, 2, 3), params))
    outputs = core.step()
    assert sorted(output.index for output in outputs) == [0, 1, 2]
    core.cancel("a", 1)
    core.cancel("a", 1)
    outputs += run_to_end(core)
    for index in (0, 2):
        assert tokens_of(outputs, "a", index) == naive_generate((1, 2, 3), params, 64, index=index)
    assert len(tokens_of(outputs, "a", 1)[0]) == 1
    assert core.num_free_blocks == 100


def test_answers_share_the_blocks_of_their_prompt() -> None:
    executor = RecordingExecutor(num_blocks=40, block_size=4)
    core = new_core(executor, EngineOptions(prefix_caching=False))
    core.add_request(
        EngineRequest("a", tuple(range(1, 10)), SamplingParams(max_tokens=4, n=4, ignore_eos=True))
    )
    core.step()
    assert executor.num_tokens[0] == 9, "the prompt is computed once"
    core.step()
    core.step()
    # Two blocks of the prompt are shared; each answer has its own third one.
    assert core.num_free_blocks == 40 - 2 - 4
    run_to_end(core)


def test_the_start_of_a_request_says_how_long_it_waited_and_what_was_cached() -> None:
    clock = Clock()
    core = new_core(FakeExecutor(VOCAB_SIZE, 100, 4), max_num_seqs=1, clock=clock)
    prompt = tuple(i % VOCAB_SIZE for i in range(17))
    core.add_request(greedy("a", prompt, 3))
    core.add_request(greedy("b", prompt, 3))
    starts = {}
    for _ in range(12):
        clock.now_s += 0.5
        for output in core.step():
            if output.start is not None:
                assert output.request_id not in starts
                starts[output.request_id] = output.start
    assert starts["a"].num_cached_tokens == 0
    assert starts["b"].num_cached_tokens == 16
    assert starts["a"].queue_s == 0.5
    assert starts["b"].queue_s > 1.0
    assert core.stats.num_prefix_queries == 34
    assert core.stats.num_prefix_hits == 16


class CountingExecutor(RecordingExecutor):
    """Says that the next number is the likeliest to follow."""

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        super().execute(inputs)
        following = (inputs.input_ids[inputs.logits_indices] + 1) % VOCAB_SIZE
        return ModelOutputs(4 * np.eye(VOCAB_SIZE, dtype=np.float32)[following])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_takes_fewer_steps_for_the_same_tokens(temperature: float) -> None:
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=7, ignore_eos=True)
    results = []
    for options in (EngineOptions(), EngineOptions(speculative_tokens=4)):
        executor = CountingExecutor(40, 4)
        core = new_core(executor, options, max_model_len=100)
        core.add_request(EngineRequest("a", tuple(range(VOCAB_SIZE)), params))
        results.append((tokens_of(run_to_end(core), "a"), len(executor.num_tokens), core.stats))
    (plain, num_steps, _), (drafted, num_drafted_steps, stats) = results
    assert drafted == plain
    assert num_steps == 60
    assert num_drafted_steps == 60 - stats.num_accepted_tokens < 50
    assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens


def test_the_next_step_is_scheduled_while_the_executor_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled_meanwhile = threading.Event()

    class WaitingExecutor(FakeExecutor):
        def execute(self, inputs: ModelInputs) -> ModelOutputs:
            if not scheduled_meanwhile.wait(10):
                raise TimeoutError("nothing was scheduled meanwhile")
            scheduled_meanwhile.clear()
            return super().execute(inputs)

    core = new_core(WaitingExecutor(VOCAB_SIZE, 100, 4))
    schedule = Scheduler.schedule

    def observed(scheduler: Scheduler) -> SchedulerOutput:
        if core.num_running:
            scheduled_meanwhile.set()
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", observed)
    core.add_request(greedy("a", (1, 2), 3))
    assert tokens_of(run_to_end(core), "a")[1] == "length"

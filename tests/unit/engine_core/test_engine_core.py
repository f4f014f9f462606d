from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from engine_core.cores import (
    EOS,
    VOCAB_SIZE,
    Clock,
    RecordingExecutor,
    greedy,
    naive_generate,
    new_core,
    run_to_end,
    tokens_of,
)

from trtforge.engine_options import EngineOptions
from trtforge.errors import CapacityError, ConfigError, RequestError
from trtforge.runtime.executor import ModelInputs, ModelOutputs
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.outputs import EngineOutput
from trtforge.runtime.request import EngineRequest, SamplingParams
from trtforge.runtime.scheduling.schedule import SchedulerOutput
from trtforge.runtime.scheduling.scheduler import Scheduler


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

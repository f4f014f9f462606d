"""Requests at random, however the engine is set: each answer is what its request gets alone."""

from __future__ import annotations

from engine_core.cores import (
    VOCAB_SIZE,
    RecordingExecutor,
    naive_generate,
    new_core,
    run_to_end,
    tokens_of,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trtforge.engine_options import EngineOptions
from trtforge.errors import RequestError
from trtforge.runtime.outputs import EngineOutput
from trtforge.runtime.request import EngineRequest, SamplingParams

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

"""Engine cores on small fake executors, and what each of their requests gets alone."""

from __future__ import annotations

from array import array
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from trtforge.engine_options import EngineOptions
from trtforge.manifest import Limits
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executor import Float32Array, ModelInputs, ModelOutputs
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.outputs import EngineOutput
from trtforge.runtime.request import EngineRequest, FinishReason, SamplingParams
from trtforge.runtime.sampling.sampler import Sampler
from trtforge.runtime.sampling.state import SamplingState

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


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


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

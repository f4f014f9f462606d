"""What becomes of requests when the executor fails or computes no numbers."""

from __future__ import annotations

import numpy as np
import pytest
from engine_core.cores import (
    VOCAB_SIZE,
    greedy,
    naive_generate,
    new_core,
    run_to_end,
    tokens_of,
)

from trtforge.errors import DeviceError
from trtforge.runtime.executor import ModelInputs, ModelOutputs
from trtforge.runtime.executors.fake_executor import FakeExecutor
from trtforge.runtime.request import EngineRequest, SamplingParams


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

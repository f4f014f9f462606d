"""Greedy tokens of SmolLM2-135M in float32 equal Hugging Face `generate`, however they are scheduled."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtforge.manifest import Limits, Manifest
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.executors.openvino_executor import OpenVINOExecutor
from trtforge.runtime.executors.reference_executor import ReferenceExecutor
from trtforge.runtime.request import EngineRequest, SamplingParams

PROMPT_LENGTHS = (3, 5, 8, 13, 16, 17, 31, 32, 33, 64, 65, 100, 150, 256, 400, 600)
NEW_TOKENS = 64

Prompts = list[tuple[int, ...]]


@dataclass(frozen=True)
class Reference:
    prompts: Prompts
    tokens: list[list[int]]  # what generate appends to each prompt


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    """Prompts cut from Python's own documentation, each continued by HF alone."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:12])
    ids = tokenizer(text)["input_ids"]
    starts = [sum(PROMPT_LENGTHS[:i]) for i in range(len(PROMPT_LENGTHS))]
    prompts = [
        tuple(ids[start : start + length]) for start, length in zip(starts, PROMPT_LENGTHS, strict=True)
    ]
    tokens = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return Reference(prompts, tokens)


@pytest.fixture(scope="module")
def make_core(demo_repository: Path) -> Iterator[Callable[..., EngineCore]]:
    """A core with other limits or fewer blocks than the repository was built with."""
    model_dir = demo_repository / "llm" / "1"
    manifest = Manifest.load(model_dir)
    executors = []

    def make(
        *,
        executor_type: type[OpenVINOExecutor | ReferenceExecutor] = OpenVINOExecutor,
        num_blocks: int = 256,
        **limits: int,
    ) -> EngineCore:
        cache = manifest.kv_cache.model_copy(update={"num_blocks": num_blocks})
        executor = executor_type(model_dir, manifest.model_copy(update={"kv_cache": cache}), threads=0)
        executors.append(executor)
        chosen = {"max_model_len": 1024, "max_num_seqs": 32, "max_num_batched_tokens": 2048} | limits
        return EngineCore(executor, Limits(**chosen), manifest.model.eos_token_ids, manifest.model.vocab_size)

    yield make
    for executor in executors:
        executor.close()


def request(index: int, prompt: tuple[int, ...]) -> EngineRequest:
    return EngineRequest(str(index), prompt, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, seed=0))


def run(core: EngineCore, prompts: Prompts, *, every: int = 0) -> list[list[int]]:
    """Tokens of each prompt; `every` steps a new request arrives (0: all before the first step)."""
    waiting = [request(i, prompt) for i, prompt in enumerate(prompts)]
    tokens: list[list[int]] = [[] for _ in prompts]
    steps = 0
    while waiting or core.has_work():
        while waiting and (every == 0 or steps % every == 0):
            core.add_request(waiting.pop(0))
            if every:
                break
        for output in core.step():
            assert output.error is None
            tokens[int(output.request_id)] += output.token_ids
        core.check_integrity()
        steps += 1
    return tokens


def test_alone(reference: Reference, make_core: Callable[..., EngineCore]) -> None:
    core = make_core()
    assert [run(core, [prompt])[0] for prompt in reference.prompts] == reference.tokens


def test_all_at_once(reference: Reference, make_core: Callable[..., EngineCore]) -> None:
    assert run(make_core(), reference.prompts) == reference.tokens


def test_staggered_arrivals(reference: Reference, make_core: Callable[..., EngineCore]) -> None:
    assert run(make_core(), reference.prompts, every=3) == reference.tokens


def test_chunked_prefill(reference: Reference, make_core: Callable[..., EngineCore]) -> None:
    core = make_core(max_num_batched_tokens=64)
    assert run(core, reference.prompts, every=2) == reference.tokens


def test_preemption(reference: Reference, make_core: Callable[..., EngineCore]) -> None:
    # The longest sequence needs 21 blocks of 32 tokens; all together need many times the pool.
    core = make_core(num_blocks=24, max_model_len=768)
    assert run(core, reference.prompts) == reference.tokens
    assert core.num_preemptions > 0


def test_reference_executor(reference: Reference, make_core: Callable[..., EngineCore]) -> None:
    """From the same files, which do not depend on the runtime."""
    core = make_core(executor_type=ReferenceExecutor)
    assert run(core, reference.prompts[:6], every=2) == reference.tokens[:6]

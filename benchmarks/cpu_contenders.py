"""One serving engine in a process of its own, driven by benchmarks/cpu_serving.py.

    python cpu_contenders.py {trtforge,transformers,openvino-genai} MODEL THREADS

Reads one JSON line a workload, {"prompts": [[token ids]], "max_tokens": [n]}, all requests of which are
there at once, and answers {"seconds": s, "num_tokens": n}. Needs nothing but numpy and the engine itself,
so that an engine can live in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Prompts = list[list[int]]
Engine = Callable[[Prompts, list[int]], int]  # generates, returns the number of tokens asked for

MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 2048


def trtforge(model: Path, threads: int) -> Engine:
    """Our engine core on the executor of the built model, in bfloat16."""
    from trtforge.engine_options import EngineOptions
    from trtforge.manifest import Limits, Manifest
    from trtforge.runtime.engine.core import EngineCore
    from trtforge.runtime.executors.create import create_executor
    from trtforge.runtime.request import EngineRequest, SamplingParams

    manifest = Manifest.load(model)
    limits = Limits(
        max_model_len=manifest.limits.max_model_len,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )
    executor = create_executor(manifest, model, EngineOptions(threads=threads))
    core = EngineCore(executor, limits, manifest.model.eos_token_ids, manifest.model.vocab_size)

    def generate(prompts: Prompts, max_tokens: list[int]) -> int:
        for index, (prompt, count) in enumerate(zip(prompts, max_tokens, strict=True)):
            sampling = SamplingParams(max_tokens=count, ignore_eos=True)
            core.add_request(EngineRequest(str(index), tuple(prompt), sampling))
        num_tokens = 0
        while core.has_work():
            num_tokens += sum(len(output.token_ids) for output in core.step())
        return num_tokens

    return generate


def transformers(model: Path, threads: int) -> Engine:
    """`generate` on one static batch, padded on the left, in bfloat16, until its longest answer is done."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    hf.generation_config.eos_token_id = None  # answers have the length that is asked for
    hf.generation_config.pad_token_id = 0

    def generate(prompts: Prompts, max_tokens: list[int]) -> int:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            result = hf.generate(ids, attention_mask=mask, max_new_tokens=max(max_tokens), do_sample=False)
        if result.shape[1] != longest + max(max_tokens):
            raise RuntimeError(f"generate stopped early: {tuple(result.shape)}")
        return sum(max_tokens)  # what the shorter requests got beyond their length is of no use

    return generate


def openvino_genai(model: Path, threads: int) -> Engine:
    """openvino-genai's continuous batching in bfloat16; its KV cache has the default type."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1  # GiB
    scheduler.max_num_seqs = MAX_NUM_SEQS
    scheduler.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)

    def generate(prompts: Prompts, max_tokens: list[int]) -> int:
        handles = []
        for index, (prompt, count) in enumerate(zip(prompts, max_tokens, strict=True)):
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = count
            config.ignore_eos = True
            config.do_sample = False
            ids = openvino.Tensor(np.asarray([prompt], np.int64))
            handles.append(pipeline.add_request(index, ids, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return sum(len(handle.read_all()[0].generated_ids) for handle in handles)

    return generate


ENGINES = {"trtforge": trtforge, "transformers": transformers, "openvino-genai": openvino_genai}


def main() -> None:
    """Load, say so, and answer until the input ends."""
    name, model, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    start = time.perf_counter()
    engine = ENGINES[name](Path(model), int(threads))
    print(json.dumps({"load_seconds": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        workload = json.loads(line)
        start = time.perf_counter()
        num_tokens = engine(workload["prompts"], workload["max_tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start, "num_tokens": num_tokens}), file=answers)


if __name__ == "__main__":
    main()

"""vLLM's v1 scheduler in a process of its own, without a model; driven by benchmarks/host_overhead.py.

    python vllm_scheduler.py

Says {"version": v}, then reads one JSON line a workload, {"prompt_lengths": [n], "num_blocks": n,
"warm_up_steps": n, "steps": n}, and answers {"schedule_us": t, "update_us": t}, medians over the steps in
which all sequences decode. Prefix caching is on, statistics and asynchronous scheduling are off, and the
heap is frozen once the scheduler stands, as vLLM's engine does.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
MAX_NUM_BATCHED_TOKENS = 8192
VOCAB_SIZE = 49_152
# Only its shape is read: of the cache, one layer's.
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": MAX_MODEL_LEN,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def make_scheduler(model: Path, num_sequences: int, num_blocks: int):
    """A scheduler as vLLM's engine core makes it, over a cache that nothing was allocated for."""
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = VllmConfig(
        model_config=ModelConfig(
            model=str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_MODEL_LEN
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_seqs=num_sequences,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        device_config=DeviceConfig(device="cpu"),
    )
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
    cache = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    config.cache_config.num_gpu_blocks = num_blocks
    manager = StructuredOutputManager(config)
    scheduler = Scheduler(config, cache, manager, block_size=BLOCK_SIZE, log_stats=False)
    if type(scheduler) is not config.scheduler_config.get_scheduler_cls():
        raise RuntimeError("vLLM would use another scheduler")
    return scheduler


def add_requests(scheduler, prompt_lengths: list[int]) -> None:
    """Greedy requests of random tokens that do not end."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hash_function = get_hash_fn_by_name(scheduler.cache_config.prefix_caching_hash_algo)
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
    tokens = random.Random(len(prompt_lengths))
    for index, length in enumerate(prompt_lengths):
        sampling = SamplingParams(temperature=0.0, max_tokens=MAX_MODEL_LEN, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        prompt = [tokens.randrange(3, VOCAB_SIZE) for _ in range(length)]
        scheduler.add_request(Request(str(index), prompt, sampling, None, block_hasher=hasher))


class Loop:
    """Schedule, answer for the model, update."""

    def __init__(self, scheduler) -> None:
        self._scheduler = scheduler
        self._step = 0
        self.schedule_s: list[float] = []
        self.update_s: list[float] = []

    def step(self) -> int:
        """Returns how many sequences got a token."""
        from vllm.v1.outputs import ModelRunnerOutput

        self._step += 1
        start = time.perf_counter()
        scheduled = self._scheduler.schedule()
        middle = time.perf_counter()
        request_ids = list(scheduled.num_scheduled_tokens)
        requests = self._scheduler.requests
        tokens = [
            # A prefill that goes on in the next step gives none.
            [3 + (index * 7 + self._step) % 1000]
            if requests[request_id].num_computed_tokens >= requests[request_id].num_tokens
            else []
            for index, request_id in enumerate(request_ids)
        ]
        result = ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=tokens,
        )
        before = time.perf_counter()
        outputs = self._scheduler.update_from_output(scheduled, result)
        end = time.perf_counter()
        self.schedule_s.append(middle - start)
        self.update_s.append(end - before)
        return sum(len(engine.outputs) for engine in outputs.values())


def measure(model: Path, workload: dict) -> dict[str, float]:
    """Run one workload with a new scheduler."""
    num_sequences, steps = len(workload["prompt_lengths"]), workload["steps"]
    scheduler = make_scheduler(model, num_sequences, workload["num_blocks"])
    add_requests(scheduler, workload["prompt_lengths"])
    gc.collect()
    gc.freeze()
    loop = Loop(scheduler)
    while loop.step() < num_sequences:
        pass
    for _ in range(workload["warm_up_steps"] + steps):
        if loop.step() != num_sequences:
            raise RuntimeError("a sequence did not decode")
    gc.unfreeze()
    return {
        "schedule_us": statistics.median(loop.schedule_s[-steps:]) * 1e6,
        "update_us": statistics.median(loop.update_s[-steps:]) * 1e6,
    }


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    print(json.dumps({"version": vllm.__version__}), file=answers)
    with tempfile.TemporaryDirectory(prefix="vllm-scheduler-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL_CONFIG))
        for line in sys.stdin:
            print(json.dumps(measure(Path(folder), json.loads(line))), file=answers)


if __name__ == "__main__":
    main()

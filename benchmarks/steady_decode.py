"""An engine with all parts but the model, decoding the same sequences step after step, and a stopwatch."""

from __future__ import annotations

import gc
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from trtforge.engine_options import EngineOptions
from trtforge.manifest import KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo
from trtforge.runtime.engine import core as engine_core
from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.engine.core import EngineCore
from trtforge.runtime.engine.messages import Add, Outputs, client_end, engine_end
from trtforge.runtime.executor import BlockMoves, KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.outputs import GenerationOutput
from trtforge.runtime.request import GenerationRequest, SamplingParams

CORE_PARTS = ("schedule", "inputs", "sample", "update", "encode")  # of the engine process
STUB_PARTS = ("decode", "deliver")  # of the process that Triton starts
PARTS = (*CORE_PARTS, *STUB_PARTS)
CPU = "cpu"
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
MAX_NUM_BATCHED_TOKENS = 8192
PROMPT_TOKENS = 256


def prompt_lengths(num_sequences: int) -> list[int]:
    """About PROMPT_TOKENS, such that the same share of the sequences needs a new block in every step."""
    return [PROMPT_TOKENS + index % BLOCK_SIZE for index in range(num_sequences)]


def num_cache_blocks(num_sequences: int, num_steps: int) -> int:
    """Enough for no preemption: every sequence's last length, and one more block each."""
    return max(num_sequences * ((PROMPT_TOKENS + num_steps) // BLOCK_SIZE + 3), MAX_MODEL_LEN // BLOCK_SIZE)


class SteadyExecutor:
    """Answers at once, as an accelerator that gives each row's likeliest token beside the logits.

    The tokens are those of a real text, so that detokenizing them costs what it does.
    """

    def __init__(self, text_token_ids: tuple[int, ...], vocab_size: int, num_blocks: int) -> None:
        self._spec = KVCacheSpec(block_size=BLOCK_SIZE, num_blocks=num_blocks)
        self._text = np.array(text_token_ids, dtype=np.int32)
        self._zeros = np.zeros(vocab_size, dtype=np.float32)
        self._step = itertools.count()

    def kv_cache_spec(self) -> KVCacheSpec:
        return self._spec

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        rows = np.arange(len(inputs.logits_indices))
        token_ids = self._text[(rows * 7 + next(self._step)) % len(self._text)]
        # Rows of one array: nothing of the size of the logits is written or read.
        logits = np.broadcast_to(self._zeros, (len(rows), len(self._zeros)))
        return ModelOutputs(logits, token_ids)

    def move_blocks(self, moves: BlockMoves) -> None:
        pass

    def close(self) -> None:
        pass


class Stopwatch:
    """Seconds spent in functions, summed by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts for `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - start
            return result

        return call

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class SteadyDecode:
    """An engine core and an engine client, joined by the real socket and its messages, in one process.

    In one process, for one after the other is how parts are timed; in two they run at the same time.
    """

    def __init__(self, model_dir: Path, num_sequences: int, num_steps: int) -> None:
        self.watch = Stopwatch()
        self._client = EngineClient(model_dir, EngineOptions())
        manifest = self._client.manifest
        text = self._client.tokenizer.encode(_sample_text())
        num_blocks = num_cache_blocks(num_sequences, num_steps)
        self._executor = SteadyExecutor(text, manifest.model.vocab_size, num_blocks)
        limits = Limits(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max(num_sequences, 1),
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        )
        self._core = EngineCore(
            self._executor, limits, manifest.model.eos_token_ids, manifest.model.vocab_size
        )
        ours, theirs = Pipe()
        self._engine_end, self._client_end = engine_end(ours), client_end(theirs)
        self._pending = False
        # The client believes in an engine process that is ready, and is given its messages one by one.
        self.channel = self
        self._engine: Any = self
        self._client._engine, self._client._is_ready = self._engine, True
        self._submit(num_sequences)

    def send(self, message: Add) -> None:
        """What the client sends to the engine process."""
        self._core.add_request(message.request)

    def receive(self) -> object:
        """What the client gets of it: the last step's message, then the end."""
        if not self._pending:
            raise EOFError
        self._pending = False
        return self._client_end.receive()

    def _submit(self, num_sequences: int) -> None:
        random = np.random.default_rng(num_sequences)
        vocab_size = self._client.manifest.model.vocab_size
        sampling = SamplingParams(max_tokens=MAX_MODEL_LEN, ignore_eos=True)
        for index, length in enumerate(prompt_lengths(num_sequences)):
            prompt = tuple(random.integers(3, vocab_size, length).tolist())
            self._client.submit(GenerationRequest(str(index), prompt, sampling), _take)
        self._num_sequences = num_sequences

    def run_to_steady_state(self) -> None:
        """Until every sequence decodes."""
        decoded = 0
        while decoded < self._num_sequences:
            decoded = self._step()

    def _step(self) -> int:
        outputs = self._core.step()
        self._deliver(outputs)
        return len(outputs)

    def _deliver(self, outputs: list[Any]) -> None:
        if self._core._in_flight is not None:
            # The executor's thread has to be done before anything else is timed: both need the interpreter.
            self._core._in_flight.future.result()
        with self.watch.timing("encode"):
            self._engine_end.send(Outputs(outputs, self._core.stats))
        self._pending = True
        with self.watch.timing("read"):
            self._client._read(self._engine)

    def measure(self, num_steps: int) -> dict[str, list[float]]:
        """Seconds of every part in each step, and of the processor in all parts together."""
        times: dict[str, list[float]] = {part: [] for part in (*PARTS, CPU)}
        watch = self.watch
        with self._watched():
            for _ in range(num_steps):
                watch.seconds.clear()
                cpu_start = time.thread_time()
                with watch.timing("step"):
                    outputs = self._core.step()
                self._deliver(outputs)
                watch.seconds[CPU] = time.thread_time() - cpu_start
                if len(outputs) != self._num_sequences:
                    raise RuntimeError(f"{len(outputs)} of {self._num_sequences} sequences decoded")
                seconds = watch.seconds
                inside = seconds["schedule"] + seconds["inputs"] + seconds["sample"]
                seconds["update"] = seconds["step"] - inside
                seconds["deliver"] = seconds["read"] - seconds["decode"]
                for part, values in times.items():
                    values.append(seconds[part])
        return times

    @contextmanager
    def _watched(self) -> Iterator[None]:
        scheduler, sampler = self._core._scheduler, self._core._results._sampler
        timed = self.watch.timed
        with (
            mock.patch.object(scheduler, "schedule", timed("schedule", scheduler.schedule)),
            mock.patch.object(
                engine_core, "build_model_inputs", timed("inputs", engine_core.build_model_inputs)
            ),
            mock.patch.object(sampler, "sample", timed("sample", sampler.sample)),
            mock.patch.object(self, "receive", timed("decode", self.receive)),
        ):
            yield

    def close(self) -> None:
        """End the executor's thread and close the socket."""
        self._core.close()
        self._engine_end.close()
        self._client_end.close()


class CollectorClock:
    """Seconds that Python's cyclic garbage collector runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._start = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._start

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the collections of the block."""
        gc.callbacks.append(self._on_collection)
        try:
            yield
        finally:
            gc.callbacks.remove(self._on_collection)


def write_manifest(folder: Path, vocab_size: int) -> None:
    """The manifest of a model of which nothing but the vocabulary is looked at."""
    Manifest(
        trtforge_version="0",
        build_key="none",
        runtime="fake",
        dtype="float32",
        model=ModelInfo(
            name="llm", architecture="None", vocab_size=vocab_size, num_parameters=1, eos_token_ids=(2,)
        ),
        kv_cache=KVCacheLayout(
            dtype="float32",
            block_size=BLOCK_SIZE,
            num_blocks=1,
            layers=(LayerCache(num_kv_heads=1, head_dim=1),),
        ),
        limits=Limits(
            max_model_len=MAX_MODEL_LEN, max_num_seqs=1, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS
        ),
        ranks=(),
        files={},
    ).save(folder)


def _sample_text() -> str:
    root = Path(__file__).parents[1]
    return "".join((root / name).read_text() for name in ("CONTRIBUTING.md", "docs/architecture.md"))


def _take(_: GenerationOutput) -> None:
    """Where Triton's response sender would be called."""

"""What the engine client costs for each output of a step: decoding, detokenizing, handing over.

    python benchmarks/delivery.py DEMO_REPOSITORY/llm/1 [--streams 256] [--steps 200] [--stop TEXT]

Steps of a greedy engine are recorded as frames and played back, so that nothing but the client is measured.
The aim is that of the whole host side: 6 us a sequence and step.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from common import Figure, describe_machine, finish

from trtforge.engine_options import EngineOptions
from trtforge.runtime.engine import client as engine_client
from trtforge.runtime.engine.client import EngineClient
from trtforge.runtime.engine.messages import FromEngine, Outputs
from trtforge.runtime.outputs import EngineOutput, EngineStats, GenerationOutput
from trtforge.runtime.request import GenerationRequest, SamplingParams

AIM_US = 6.0


class Playback:
    """In place of an engine process: takes requests, and gives out frames once they are loaded."""

    def __init__(self, *_: object) -> None:
        self.channel = self
        self.request_ids: list[str] = []
        self.frames: Iterator[bytes] = iter(())
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def wait_until_ready(self) -> EngineStats:
        return EngineStats()

    def send(self, message: object) -> None:
        self.request_ids.append(message.request.request_id)  # type: ignore[attr-defined]

    def receive(self) -> object:
        frame = next(self.frames, None)
        if frame is None:
            raise EOFError
        return self._decoder.decode(frame)


def record(request_ids: list[str], num_steps: int, vocab_size: int) -> list[bytes]:
    """Frames of random tokens for all requests in each step."""
    tokens, encoder = random.Random(0), msgspec.msgpack.Encoder()
    return [
        encoder.encode(
            Outputs(
                [EngineOutput(request_id, (tokens.randrange(vocab_size),)) for request_id in request_ids],
                EngineStats(),
            )
        )
        for _ in range(num_steps)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stop", action="append", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine_client.EngineHandle = Playback  # type: ignore[assignment, misc]
    client = EngineClient(arguments.model_dir, EngineOptions())
    engine = client._start_engine()
    received = 0

    def on_output(_: GenerationOutput) -> None:
        nonlocal received
        received += 1

    sampling = SamplingParams(max_tokens=arguments.steps + 1, stop=tuple(arguments.stop))
    for i in range(arguments.streams):
        client.submit(GenerationRequest(str(i), (1, 2, 3), sampling), on_output)
    frames = record(engine.request_ids, arguments.steps, client.manifest.model.vocab_size)  # type: ignore[attr-defined]
    best_s = float("inf")
    gc.collect()
    for _ in range(5):
        engine.frames = iter(frames)  # type: ignore[attr-defined]
        start = time.perf_counter()
        client._read(engine)
        best_s = min(best_s, time.perf_counter() - start)
    outputs = arguments.streams * arguments.steps
    figure = Figure("delivery", best_s / outputs * 1e6, "us/output", aim=AIM_US, higher_is_better=False)
    finish(figure, [], describe_machine(["msgspec"]), arguments.json)


if __name__ == "__main__":
    main()

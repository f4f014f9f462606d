"""How tests ask a real server, and wait for one that is coming back."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from trtforge.client.streaming import Client, SamplingOptions
from trtforge.client.triton_server import TritonServer
from trtforge.errors import CapacityError, ServerError, TrtforgeError

TIMEOUT_S = 60
ONE_TOKEN = SamplingOptions(max_tokens=1)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "1 2 3 4 5",
)


def ask_all(server: TritonServer) -> list[tuple[int, ...]]:
    """The tokens after each of PROMPTS, which are asked at the same time."""
    with Client(server.grpc_url) as client, ThreadPoolExecutor(len(PROMPTS)) as pool:
        sampling = SamplingOptions(max_tokens=32)
        completions = pool.map(lambda prompt: client.generate(prompt, sampling=sampling), PROMPTS)
        return [completion.token_ids for completion in completions]


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_answer(client: Client, timeout_s: float = TIMEOUT_S) -> list[TrtforgeError]:
    """Until the model answers; the errors on the way."""
    errors: list[TrtforgeError] = []

    def answers() -> bool:
        try:
            return bool(client.generate("Hello", sampling=ONE_TOKEN, timeout_s=timeout_s).token_ids)
        except (CapacityError, ServerError) as error:
            errors.append(error)
            return False

    wait_until(answers, timeout_s)
    return errors

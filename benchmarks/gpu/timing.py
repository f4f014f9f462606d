"""Time on the GPU, without the launches: graphs are replayed between two events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

WARMUP = 3
ROUNDS = 7


def time_each(calls: Sequence[Callable[[], object]], *, min_seconds: float = 0.02) -> float:
    """Seconds of one of `calls`, which do the same work on different memory.

    All are captured in one CUDA graph; give enough of them that their memory exceeds the L2 cache, or the
    second finds there what the first has read. Median over rounds of at least `min_seconds`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # what is loaded or allocated at the first call may not be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _time_replays(graph, min_seconds) / len(calls)


def _time_replays(graph: torch.cuda.CUDAGraph, min_seconds: float) -> float:
    """Seconds of one replay."""
    for _ in range(WARMUP):
        graph.replay()
    num_replays = max(1, round(min_seconds / max(_seconds(graph, 1), 1e-6)))
    return statistics.median(_seconds(graph, num_replays) / num_replays for _ in range(ROUNDS))


def _seconds(graph: torch.cuda.CUDAGraph, num_replays: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def num_copies(bytes_each: int, *, limit: int = 64) -> int:
    """How many copies of something exceed the L2 cache four times over, `limit` at most."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(limit, max(1, -(-4 * l2_bytes // bytes_each)))

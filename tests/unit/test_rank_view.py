"""One rank's part of a model."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from trtforge.engine_options import EngineOptions
from trtforge.manifest import LayerCache, Manifest, Rank
from trtforge.runtime.executors.memory_budget import MemoryBudget
from trtforge.runtime.parallel.rank_view import (
    RankContext,
    cache_share,
    plan_rank_memory,
    rank_manifest,
    share_threads,
)

WHOLE = (LayerCache(num_kv_heads=3, head_dim=16),) * 4
BLOCK_BYTES = 4 * 3 * 2 * 16 * 4 * 32  # of all ranks


@pytest.fixture
def manifest(make_manifest: Callable[..., Manifest]) -> Manifest:
    """Two stages of two layers, whose ranks have two heads and one."""
    ranks = tuple(
        Rank(
            onnx=f"rank{number}/model.onnx",
            kv_layers=(LayerCache(num_kv_heads=heads, head_dim=16),) * 2,
            logits_columns=columns,
        )
        for number, (heads, columns) in enumerate([(2, (0, 0)), (1, (0, 0)), (2, (0, 70)), (1, (70, 128))])
    )
    files = {f"rank{number}/{name}": 10**number for number in range(4) for name in ("model.onnx", "w")}
    changes = {
        "ranks": ranks,
        "tp_size": 2,
        "pp_size": 2,
        "files": {**files, "tokenizer/a": 5, "rank10/w": 3},
    }
    return make_manifest(WHOLE).model_copy(update=changes)


def test_a_rank_sees_its_own_graph_caches_and_files(manifest: Manifest) -> None:
    view = rank_manifest(manifest, 1)
    assert view.ranks == (manifest.ranks[1],)
    assert (view.tp_size, view.pp_size) == (1, 1)
    assert view.kv_cache.layers == manifest.ranks[1].kv_layers
    assert view.kv_cache.num_blocks == manifest.kv_cache.num_blocks
    assert view.files == {"rank1/model.onnx": 10, "rank1/w": 10}


@pytest.mark.parametrize("cache_on_host", [True, False])
def test_what_all_ranks_may_take_is_all_they_take(manifest: Manifest, cache_on_host: bool) -> None:
    """However different their parts are, nobody is left with fewer blocks than the others."""
    options = EngineOptions(kv_cache_bytes=10 * BLOCK_BYTES + 8, swap_bytes=6 * BLOCK_BYTES + 7)
    shares = [cache_share(manifest, rank, range(4)) for rank in range(4)]
    assert shares == [Fraction(1, 3), Fraction(1, 6)] * 2
    for rank, share in enumerate(shares):
        agreed: list[MemoryBudget] = []

        def agree(budget: MemoryBudget, agreed: list[MemoryBudget] = agreed) -> MemoryBudget:
            agreed.append(budget)
            return budget

        context = RankContext(None, share, share, rank, agree)  # type: ignore[arg-type]
        view = rank_manifest(manifest, rank)
        budget = plan_rank_memory(view, options, 10**12, context, cache_on_host=cache_on_host)
        assert agreed == [budget]
        assert budget.num_host_blocks == 6
        # A GPU has the whole of it for its rank alone.
        assert budget.num_blocks == (10 if cache_on_host else int(10 / share))


def test_ranks_on_two_machines_divide_the_free_memory_of_each(manifest: Manifest) -> None:
    """Of the four, the first three are on one machine; a cap in bytes is still one for all."""
    options = EngineOptions(kv_cache_fraction=0.5)
    available_bytes = 40 * BLOCK_BYTES
    rooms = []
    for rank, here in enumerate([(0, 1, 2), (0, 1, 2), (0, 1, 2), (3,)]):
        share, node_share = cache_share(manifest, rank, range(4)), cache_share(manifest, rank, here)
        context = RankContext(None, share, node_share, rank, lambda budget: budget)  # type: ignore[arg-type]
        rooms.append(plan_rank_memory(rank_manifest(manifest, rank), options, available_bytes, context))
    used = [budget.num_blocks * budget.block_bytes for budget in rooms]
    assert sum(used[:3]) == used[3] == available_bytes / 2


def test_threads_are_divided() -> None:
    assert share_threads(EngineOptions(threads=8), 2).threads == 4
    assert share_threads(EngineOptions(threads=2), 4).threads == 1
    assert share_threads(EngineOptions(), 1000).threads == 1

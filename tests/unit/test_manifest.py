"""A manifest says which rank has which layers, heads and logits, and never contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtforge import wire
from trtforge.errors import ConfigError
from trtforge.manifest import MANIFEST_FILE, LayerCache, Manifest, Rank

VOCAB_SIZE = 10


def layer(num_kv_heads: int, window: int = 0) -> LayerCache:
    return LayerCache(num_kv_heads=num_kv_heads, head_dim=8, window=window)


# Three layers of 3 KV heads in two stages, each on two ranks: 2 + 1 KV heads.
WHOLE = (layer(3, 6), layer(3), layer(3, 6))
RANKS = (
    Rank(onnx="rank0/model.onnx", kv_layers=(layer(2, 6), layer(2))),
    Rank(onnx="rank1/model.onnx", kv_layers=(layer(1, 6), layer(1))),
    Rank(onnx="rank2/model.onnx", kv_layers=(layer(2, 6),), logits_columns=(0, 6)),
    Rank(onnx="rank3/model.onnx", kv_layers=(layer(1, 6),), logits_columns=(6, VOCAB_SIZE)),
)
EARLY = RANKS[0].model_copy(update={"logits_columns": (0, VOCAB_SIZE)})
Load = Callable[..., Manifest]


@pytest.fixture
def load(make_manifest: Callable[..., Manifest], tmp_path: Path) -> Load:
    """`load(**changes)`: the manifest of RANKS, written with these changes and read again."""

    def load(**changes: Any) -> Manifest:
        manifest = make_manifest(WHOLE, vocab_size=VOCAB_SIZE)
        written = {"tp_size": 2, "pp_size": 2, "ranks": RANKS} | changes
        manifest.model_copy(update=written).save(tmp_path)
        return Manifest.load(tmp_path)

    return load


def test_ranks_are_ordered_by_stage(load: Load) -> None:
    assert load().stages == (RANKS[:2], RANKS[2:])


def test_kv_heads_may_be_on_several_ranks(load: Load) -> None:
    ranks = [rank.model_copy(update={"kv_layers": WHOLE}) for rank in RANKS[2:]]
    assert load(pp_size=1, ranks=tuple(ranks)).stages == (tuple(ranks),)


def test_a_model_that_is_not_split_needs_no_sizes(load: Load, tmp_path: Path) -> None:
    one = Rank(onnx="rank0/model.onnx", kv_layers=WHOLE, logits_columns=(0, VOCAB_SIZE))
    manifest = load(tp_size=1, pp_size=1, ranks=(one,))
    fields = json.loads((tmp_path / MANIFEST_FILE).read_text())
    (tmp_path / MANIFEST_FILE).write_text(
        json.dumps({name: fields[name] for name in fields if not name.endswith("p_size")})
    )
    assert Manifest.load(tmp_path) == manifest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pp_size": 1}, r"4 ranks are not tp_size 2 \* pp_size 1"),
        ({"tp_size": 1, "pp_size": 1, "ranks": ()}, r"0 ranks are not tp_size 1 \* pp_size 1"),
        ({"ranks": (*RANKS[:3], RANKS[2])}, r"\(\(0, 6\), \(0, 6\)\) do not cover 10 tokens"),
        (
            {"ranks": (RANKS[1], RANKS[1], *RANKS[2:])},
            "ranks of a stage have fewer KV heads than num_kv_heads=3",
        ),
        ({"ranks": (EARLY, *RANKS[1:])}, "a stage before the last has columns of logits"),
        (
            {"ranks": (RANKS[0], RANKS[3], *RANKS[2:])},
            "rank3/model.onnx has caches that are not those of its",
        ),
        ({"pp_size": 1, "ranks": RANKS[2:]}, "2 of the layers have no rank"),
        ({"ranks": (*RANKS[:2], RANKS[3], RANKS[2])}, r"\(\(6, 10\), \(0, 6\)\) do not cover 10 tokens"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], said: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=said):
        load(**changes)


def test_stages_hand_hidden_states_on() -> None:
    def names(*, is_first: bool, is_last: bool) -> list[str]:
        return [*wire.stage_inputs(is_first=is_first, is_last=is_last), wire.stage_output(is_last=is_last)]

    rows = ["position_ids", "block_tables", "cu_seqlens", "context_lens", "slot_mapping"]
    assert names(is_first=True, is_last=True) == [
        *(tensor.name for tensor in wire.GRAPH_INPUTS),
        "logits",
    ]
    assert names(is_first=True, is_last=False) == ["input_ids", *rows, "hidden_states_out"]
    assert names(is_first=False, is_last=False) == ["hidden_states", *rows, "hidden_states_out"]
    assert names(is_first=False, is_last=True) == ["hidden_states", *rows, "logits_indices", "logits"]

"""What a plan says in words: which change makes a deployment fit, and what ranks do not share evenly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trtforge.builder.planning.capacity import Capacity, plan_capacity
from trtforge.builder.planning.deployment import Deployment, WeightFormatName
from trtforge.builder.planning.model_shape import ModelShape
from trtforge.builder.planning.ranks import rank_heads

# Ranks of one machine, which its fast links join.
MACHINE_RANKS = 8


def remedies(model: ModelShape, deployment: Deployment) -> list[str]:
    """Options each of which alone makes `deployment` fit, from the least change to the greatest.

    Where no single one does: FP8 or INT4 over as few ranks as possible. Empty if it fits or nothing helps.
    """
    capacity = plan_capacity(model, deployment)
    if capacity.fits:
        return []
    found = []
    if capacity.longest_sequence:
        found.append(f"--max-model-len {capacity.longest_sequence}")
    if deployment.kv_cache == "16-bit" and _fits(model, replace(deployment, kv_cache="fp8")):
        found.append("--kv-cache-dtype fp8")
    formats = list(_smaller_formats(deployment))
    found += [option for option, weights in formats if _fits(model, replace(deployment, weights=weights))]
    found += _with_more_ranks(model, deployment)
    if found:
        return found
    return [
        f"{option} {more}"
        for option, weights in formats
        for more in _with_more_ranks(model, replace(deployment, weights=weights))
    ]


def _fits(model: ModelShape, deployment: Deployment) -> bool:
    return plan_capacity(model, deployment).fits


def _smaller_formats(deployment: Deployment) -> Iterator[tuple[str, WeightFormatName]]:
    """Formats with fewer bits, and their options."""
    if deployment.weights == "16-bit":
        yield "--fp8", "fp8-weight-only"
    if deployment.weights != "int4":
        yield "--int4", "int4"


def _with_more_ranks(model: ModelShape, deployment: Deployment) -> list[str]:
    fewest_heads = min(layer.num_heads for layer in model.layers)
    tp = 2 * deployment.tp
    while tp <= min(fewest_heads, MACHINE_RANKS):
        if _fits(model, replace(deployment, tp=tp)):
            return [f"--tp {tp}"]
        tp *= 2
    return []


def remarks(model: ModelShape, deployment: Deployment, capacity: Capacity) -> list[str]:
    """What is not shared evenly, or not bounded, or otherwise not as one may expect."""
    return [
        *_head_remarks(model, deployment.tp),
        *_feature_remarks(model, deployment.tp),
        *_stage_remarks(model, deployment),
        *_window_remarks(model, deployment, capacity),
    ]


def _head_remarks(model: ModelShape, tp: int) -> Iterator[str]:
    for num_heads, num_kv_heads in sorted({(x.num_heads, x.cache.num_kv_heads) for x in model.layers}):
        heads, kv_heads = rank_heads(num_heads, num_kv_heads, tp)
        if tp > num_kv_heads:
            yield (
                f"KV heads are replicated: there are {num_kv_heads} for {tp} ranks, each of which has one "
                f"and up to {heads} of {num_heads} query heads; a rank's KV cache does not shrink any further"
            )
        elif num_kv_heads % tp:
            yield (
                f"heads are uneven: {num_kv_heads} KV heads over {tp} ranks make {kv_heads} on the largest, "
                f"with {heads} of {num_heads} query heads; the largest rank is what is planned"
            )


def _feature_remarks(model: ModelShape, tp: int) -> Iterator[str]:
    shared, whole_bytes = set(), 0
    for layer in model.layers:
        for matmul in layer.matmuls:
            if matmul.sharded is None:
                whole_bytes += matmul.out_features * matmul.in_features * matmul.element_bytes
            elif not (matmul.per_head or matmul.per_kv_head):
                size = matmul.out_features if matmul.sharded == "out" else matmul.in_features
                shared.add(size // matmul.parts)
    for size in sorted(size for size in shared if size % tp):
        yield f"an MLP of {size:,} features over {tp} ranks: the largest has {-(-size // tp):,}"
    if tp > 1 and whole_bytes:
        yield f"every rank has all of what no head or MLP owns: {whole_bytes / 2**20:,.1f} MiB in 16 bit"
    if tp > MACHINE_RANKS:
        yield f"--tp {tp} leaves the machine: links between machines are slower than the one that is assumed"


def _stage_remarks(model: ModelShape, deployment: Deployment) -> Iterator[str]:
    if deployment.pp == 1:
        return
    if len(model.layers) % deployment.pp:
        yield f"{len(model.layers)} layers over {deployment.pp} stages: the first ones have one more"
    if model.is_tied:
        yield "the first and the last stage have a copy of the tied embedding each"
    yield "times are of one batch that goes through all stages; others can run in the stages it has left"


def _window_remarks(model: ModelShape, deployment: Deployment, capacity: Capacity) -> Iterator[str]:
    windows = [layer.cache.window for layer in model.layers if layer.cache.window]
    longest = deployment.limits.max_model_len
    if not windows or longest <= min(windows):
        return
    if capacity.window is not None:
        yield f"every layer slides: a sequence never holds more than about {capacity.window:,} tokens"
        return
    kept = bounded = 0
    for stage in capacity.stages:
        for window, (_, nbytes) in stage.attention.items():
            kept += longest * nbytes
            bounded += min(longest, window or longest) * nbytes
    yield (
        f"{len(windows)} of {len(model.layers)} layers slide, over {min(windows):,} tokens or more, and read "
        "no further back; the cache keeps all of their tokens, because layers share one block table: "
        f"{kept / 2**20:,.0f} MiB for {longest:,} tokens, of which {bounded / 2**20:,.0f} MiB are read"
    )

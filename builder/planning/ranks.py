"""What the largest rank of each pipeline stage keeps, reads and computes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trtforge.builder.planning.deployment import KV_ELEMENT_BYTES, WEIGHT_FORMATS, Deployment
from trtforge.builder.planning.model_shape import Layer, Matmul, ModelShape
from trtforge.builder.sharding.split import Range, split_features, split_heads, split_layers
from trtforge.errors import ConfigError


def rank_heads(num_heads: int, num_kv_heads: int, tp: int) -> tuple[int, int]:
    """Query heads and KV heads of the rank with the most of them."""
    shares = split_heads(num_heads, num_kv_heads, tp)
    return max(_length(share.heads) for share in shares), max(_length(share.kv_heads) for share in shares)


def _length(part: Range) -> int:
    return part[1] - part[0]


def rank_sizes(matmul: Matmul, layer: Layer, tp: int) -> tuple[int, int]:
    """Output and input features on the rank with the most of them."""
    sizes = {"out": matmul.out_features, "in": matmul.in_features}
    if matmul.sharded is not None:
        if matmul.per_head or matmul.per_kv_head:
            heads, kv_heads = rank_heads(layer.num_heads, layer.cache.num_kv_heads, tp)
            size = matmul.per_head * heads + matmul.per_kv_head * kv_heads
        else:
            size = sizes[matmul.sharded] // matmul.parts
            ranges = split_features(size, tp)
            size = matmul.parts * (max(map(_length, ranges)) if ranges else size)
        sizes[matmul.sharded] = size
    return sizes["out"], sizes["in"]


@dataclass(frozen=True, slots=True)
class Weight:
    """Weights of equal layout that a step multiplies by; `copies` of which a token uses `active`."""

    nbytes: int  # of one copy
    scales_bytes: int  # of those, scales
    flops: int  # of one token with one copy
    in_fp8: bool  # multiplied by FP8 units
    is_quantized: bool
    copies: int = 1
    active: int = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """The rank with the most of everything in one pipeline stage."""

    weights: tuple[tuple[Weight, int], ...]  # of matmuls in layers, and how often
    other_bytes: int  # norms, biases and the like
    embedding_bytes: int  # input embedding; 0 where it is the output embedding too, or in another stage
    head: Weight | None  # output embedding, of the last stage
    # By the window of layers (0: none): FLOPs for each pair of a query token and a token that it sees, and
    # bytes that the cache has for a token.
    attention: dict[int, tuple[int, int]] = field(hash=False)
    features_per_token: int  # that the matmuls of the widest layer put out
    num_layers: int

    @property
    def weight_bytes(self) -> int:
        """All that is on the GPU before a request comes."""
        matmuls = sum(count * weight.copies * weight.nbytes for weight, count in self.weights)
        head_bytes = self.head.nbytes if self.head else 0
        return matmuls + head_bytes + self.embedding_bytes + self.other_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache for one token in all layers of the stage."""
        return sum(nbytes for _, nbytes in self.attention.values())


def split_model(model: ModelShape, deployment: Deployment) -> tuple[Stage, ...]:
    """The stages of the deployment, in order.

    Raises ConfigError if there are ranks without a head or stages without a layer.
    """
    tp, pp = deployment.tp, deployment.pp
    fewest = min(layer.num_heads for layer in model.layers)
    if tp > fewest:
        raise ConfigError(f"--tp {tp} is more than the {fewest} attention heads of {model.architecture}")
    if pp > len(model.layers):
        raise ConfigError(f"--pp {pp} is more than the {len(model.layers)} layers of {model.architecture}")
    return tuple(
        _stage(model, deployment, model.layers[start:stop], number)
        for number, (start, stop) in enumerate(split_layers(len(model.layers), pp))
    )


def _stage(model: ModelShape, deployment: Deployment, layers: Sequence[Layer], number: int) -> Stage:
    tp, is_first, is_last = deployment.tp, number == 0, number == deployment.pp - 1
    rows = math.ceil(model.vocab_size / tp)
    head_bytes = math.ceil(rows * model.head_bytes / model.vocab_size)
    has_own_embedding = is_first and not (model.is_tied and is_last)
    weights: Counter[Weight] = Counter()
    attention: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for layer in layers:
        weights.update(_weight(matmul, layer, deployment) for matmul in layer.matmuls)
        heads, kv_heads = rank_heads(layer.num_heads, layer.cache.num_kv_heads, tp)
        sums = attention[layer.cache.window]
        sums[0] += 4 * heads * layer.cache.head_dim  # q k and p v, two operations each
        sums[1] += 2 * kv_heads * layer.cache.head_dim * KV_ELEMENT_BYTES[deployment.kv_cache]
    return Stage(
        weights=tuple(weights.items()),
        other_bytes=sum(layer.other_bytes for layer in layers) + (model.other_bytes if is_last else 0),
        embedding_bytes=math.ceil(rows * model.embedding_bytes / model.vocab_size)
        if has_own_embedding
        else 0,
        head=Weight(head_bytes, 0, 2 * rows * model.hidden_size, False, False) if is_last else None,
        attention={window: (flops, nbytes) for window, (flops, nbytes) in attention.items()},
        features_per_token=max(_features(layer, tp) for layer in layers),
        num_layers=len(layers),
    )


def _weight(matmul: Matmul, layer: Layer, deployment: Deployment) -> Weight:
    out_features, in_features = rank_sizes(matmul, layer, deployment.tp)
    plain = Weight(
        nbytes=out_features * in_features * matmul.element_bytes,
        scales_bytes=0,
        flops=2 * out_features * in_features,
        in_fp8=False,
        is_quantized=False,
        copies=matmul.copies,
        active=matmul.active,
    )
    weight_format = WEIGHT_FORMATS[deployment.weights]
    group_size = weight_format.group_size(matmul.in_features)  # ranks cut a weight between groups
    if deployment.weights == "16-bit" or not matmul.is_quantized or group_size is None:
        return plain
    data_bytes = weight_format.data_bytes(out_features, in_features, has_tiles=matmul.copies == 1)
    scales_bytes = weight_format.scales_bytes(out_features, in_features, group_size)
    return replace(
        plain,
        nbytes=data_bytes + scales_bytes,
        scales_bytes=scales_bytes,
        in_fp8=weight_format.uses_fp8_matmul,
        is_quantized=True,
    )


def _features(layer: Layer, tp: int) -> int:
    """Output features of all matmuls that one token goes through."""
    return sum(matmul.active * rank_sizes(matmul, layer, tp)[0] for matmul in layer.matmuls)

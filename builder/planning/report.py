"""What a plan came to, in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import Self

from trtforge.builder.planning.advice import remarks, remedies
from trtforge.builder.planning.capacity import Capacity, lengths_to_show, plan_capacity
from trtforge.builder.planning.deployment import Deployment
from trtforge.builder.planning.model_shape import ModelShape
from trtforge.builder.planning.ranks import Stage
from trtforge.builder.planning.roofline import Bound, Roofline

Prediction = Literal["upper bound", "scaled by efficiency", "none"]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PROMPTS = (128, 512, 2048, 8192, 32768)


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageMemory(_Figures):
    """Bytes on the largest rank of one pipeline stage."""

    num_layers: int
    quantized_bytes: int  # weights in FP8 or INT4, without their scales
    scales_bytes: int
    embeddings_bytes: int  # input and output embedding, always in 16 bit
    other_weights_bytes: int  # 16-bit weights besides embeddings
    activations_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int  # what is left for it; negative: weights and activations do not fit

    @classmethod
    def of(cls, stage: Stage, activation_bytes: int, free_bytes: int) -> Self:
        """The memory of `stage`."""
        quantized = [(weight, count) for weight, count in stage.weights if weight.is_quantized]
        scales_bytes = sum(count * weight.copies * weight.scales_bytes for weight, count in quantized)
        both_bytes = sum(count * weight.copies * weight.nbytes for weight, count in quantized)
        embeddings_bytes = stage.embedding_bytes + (stage.head.nbytes if stage.head else 0)
        return cls(
            num_layers=stage.num_layers,
            quantized_bytes=both_bytes - scales_bytes,
            scales_bytes=scales_bytes,
            embeddings_bytes=embeddings_bytes,
            other_weights_bytes=stage.weight_bytes - both_bytes - embeddings_bytes,
            activations_bytes=activation_bytes,
            kv_bytes_per_token=stage.kv_bytes_per_token,
            kv_cache_bytes=free_bytes,
        )


class SequencesThatFit(_Figures):
    """How many sequences of one length the cache holds at once."""

    num_tokens: int
    bytes_per_sequence: int  # on the largest rank
    num_sequences: int


class Prefill(_Figures):
    """The time to the first token of a prompt alone on the machine."""

    prompt_len: int  # tokens
    time_ms: float
    tokens_per_s: float
    bound: Bound


class Decode(_Figures):
    """One step that gives each of `batch` sequences a token."""

    batch: int
    context_len: int  # tokens
    step_ms: float
    tokens_per_s: float
    bound: Bound
    fits: bool  # into the KV cache


class PlanReport(_Figures):
    """The figures of one plan. Without times where the GPU's rates are not known."""

    source: str  # MODEL as it was given
    architecture: str
    num_parameters: int
    gpu: str
    gpu_source: str
    gpu_memory_bytes: int
    memory_fraction: float
    tp: int
    pp: int
    dtype: str
    weights: str
    kv_cache: str
    block_size: int  # tokens
    max_model_len: int  # tokens
    max_num_seqs: int
    max_num_batched_tokens: int
    fits: bool
    remedies: tuple[str, ...]
    remarks: tuple[str, ...]
    stages: tuple[StageMemory, ...]
    num_blocks: int
    sequences: tuple[SequencesThatFit, ...]
    efficiency: float
    prediction: Prediction
    ridge_batch: int | None
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]

    @classmethod
    def of(cls, model: ModelShape, deployment: Deployment, *, source: str, dtype: str) -> Self:
        """Plan `deployment` of `model`. Raises ConfigError if the model cannot be split that way."""
        capacity = plan_capacity(model, deployment)
        limits, gpu = deployment.limits, deployment.gpu
        roofline = None
        if gpu.compute is not None:
            roofline = Roofline(model, deployment, capacity.stages, gpu.compute)
        scaled: Prediction = "upper bound" if deployment.efficiency == 1 else "scaled by efficiency"
        return cls(
            source=source,
            architecture=model.architecture,
            num_parameters=model.num_parameters,
            gpu=gpu.title,
            gpu_source=gpu.source,
            gpu_memory_bytes=gpu.memory_bytes,
            memory_fraction=deployment.memory_fraction,
            tp=deployment.tp,
            pp=deployment.pp,
            dtype=dtype,
            weights=dtype if deployment.weights == "16-bit" else deployment.weights,
            kv_cache=dtype if deployment.kv_cache == "16-bit" else deployment.kv_cache,
            block_size=deployment.block_size,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            fits=capacity.fits,
            remedies=tuple(remedies(model, deployment)),
            remarks=tuple(remarks(model, deployment, capacity)),
            stages=tuple(
                StageMemory.of(*figures)
                for figures in zip(
                    capacity.stages, capacity.activation_bytes, capacity.free_bytes, strict=True
                )
            ),
            num_blocks=capacity.num_blocks,
            sequences=_sequences(capacity),
            efficiency=deployment.efficiency,
            prediction="none" if roofline is None else scaled,
            ridge_batch=None if roofline is None else roofline.ridge_batch(),
            prefill=() if roofline is None else _prefill(roofline, limits.max_model_len),
            decode=() if roofline is None else _decode(roofline, capacity, limits.max_num_seqs),
        )

    def save(self, file: Path) -> None:
        """Write the figures as JSON."""
        file.write_text(self.model_dump_json(indent=2) + "\n")


def _sequences(capacity: Capacity) -> tuple[SequencesThatFit, ...]:
    block_bytes = max(stage.kv_bytes_per_token for stage in capacity.stages) * capacity.block_size
    return tuple(
        SequencesThatFit(
            num_tokens=length,
            bytes_per_sequence=capacity.sequence_blocks(length) * block_bytes,
            num_sequences=capacity.num_sequences(length),
        )
        for length in lengths_to_show(capacity.max_model_len)
    )


def _prefill(roofline: Roofline, max_model_len: int) -> tuple[Prefill, ...]:
    rows = []
    for prompt_len in lengths_to_show(max_model_len, _PROMPTS):
        time = roofline.prefill(prompt_len)
        rows.append(
            Prefill(
                prompt_len=prompt_len,
                time_ms=1000 * time.seconds,
                tokens_per_s=prompt_len / time.seconds,
                bound=time.bound,
            )
        )
    return tuple(rows)


def _decode(roofline: Roofline, capacity: Capacity, max_num_seqs: int) -> tuple[Decode, ...]:
    points = []
    for batch in lengths_to_show(min(max_num_seqs, BATCHES[-1]), BATCHES):
        for context_len in lengths_to_show(capacity.max_model_len):
            time = roofline.decode(batch, context_len)
            points.append(
                Decode(
                    batch=batch,
                    context_len=context_len,
                    step_ms=1000 * time.seconds,
                    tokens_per_s=batch / time.seconds,
                    bound=time.bound,
                    fits=capacity.num_sequences(context_len) >= batch,
                )
            )
    return tuple(points)

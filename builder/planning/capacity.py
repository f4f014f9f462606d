"""Whether a deployment fits into memory, and how many sequences it then holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtforge.builder.plan import blocks_per_sequence
from trtforge.builder.planning.deployment import Deployment
from trtforge.builder.planning.model_shape import ModelShape
from trtforge.builder.planning.ranks import Stage, split_model
from trtforge.manifest import MAX_SLOTS

ACTIVATION_BYTES = 2  # of an activation
LOGIT_BYTES = 4  # logits leave the graph as float32


@dataclass(frozen=True, slots=True)
class Capacity:
    """The memory of one deployment. Stages are pipeline stages, each with its largest rank."""

    stages: tuple[Stage, ...]
    activation_bytes: tuple[int, ...]  # of each stage
    budget_bytes: int  # of one GPU that may be used
    block_size: int  # tokens
    window: int | None  # of the model
    max_model_len: int  # tokens

    @property
    def free_bytes(self) -> tuple[int, ...]:
        """What is left for the KV cache on each stage; negative if weights and activations do not fit."""
        return tuple(
            self.budget_bytes - stage.weight_bytes - activation_bytes
            for stage, activation_bytes in zip(self.stages, self.activation_bytes, strict=True)
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache: all stages have as many as the stage with the fewest."""
        return min(
            min(max(free, 0) // (stage.kv_bytes_per_token * self.block_size), MAX_SLOTS // self.block_size)
            for free, stage in zip(self.free_bytes, self.stages, strict=True)
        )

    def num_sequences(self, num_tokens: int) -> int:
        """Sequences of `num_tokens` that the KV cache holds at once."""
        return self.num_blocks // self.sequence_blocks(num_tokens)

    def sequence_blocks(self, num_tokens: int) -> int:
        """Blocks that one sequence of `num_tokens` holds while it decodes.

        All layers share one block table, so that blocks are given back behind a window only where every
        layer has one.
        """
        blocks = blocks_per_sequence(num_tokens, self.block_size)
        if self.window is None:
            return blocks
        return min(blocks, blocks_per_sequence(self.window, self.block_size) + 1)

    @property
    def fits(self) -> bool:
        """Whether one sequence of max_model_len can be served."""
        return self.num_sequences(self.max_model_len) >= 1

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, up to max_model_len, that fits alone; 0 if none does."""
        if self.fits:
            return self.max_model_len
        return min(self.num_blocks * self.block_size, self.max_model_len - 1)


def plan_capacity(model: ModelShape, deployment: Deployment) -> Capacity:
    """The memory that `deployment` takes. Raises ConfigError if the model cannot be split that way."""
    stages = split_model(model, deployment)
    return Capacity(
        stages=stages,
        activation_bytes=tuple(_activation_bytes(model, deployment, stage) for stage in stages),
        budget_bytes=int(deployment.gpu.memory_bytes * deployment.memory_fraction),
        block_size=deployment.block_size,
        window=model.window,
        max_model_len=deployment.limits.max_model_len,
    )


def _activation_bytes(model: ModelShape, deployment: Deployment, stage: Stage) -> int:
    """A step of max_num_batched_tokens packed tokens.

    Residual, normed hidden state and everything that the matmuls of the widest layer put out live at once;
    on the last stage also the logits of max_num_seqs tokens. Attention keeps no scores.
    """
    limits = deployment.limits
    features = 2 * model.hidden_size + stage.features_per_token
    hidden_bytes = limits.max_num_batched_tokens * features * ACTIVATION_BYTES
    if stage.head is None:
        return hidden_bytes
    rows = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    return hidden_bytes + rows * model.vocab_size * LOGIT_BYTES


def lengths_to_show(max_model_len: int, wanted: Sequence[int] = (1024, 4096, 8192, 32768)) -> list[int]:
    """The lengths below `max_model_len` that tables show, and itself."""
    return [*(length for length in wanted if length < max_model_len), max_model_len]

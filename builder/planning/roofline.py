"""How long steps take if nothing but memory, matrix units and links bounds them.

Parts of a step run one after the other: projections, experts, attention, output embedding, communication. A
part takes as long as its bytes or its operations do, whichever is longer (Williams, Waterman and Patterson,
"Roofline: An Insightful Visual Performance Model for Multicore Architectures", 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trtforge.builder.planning.capacity import ACTIVATION_BYTES, LOGIT_BYTES
from trtforge.builder.planning.deployment import Deployment
from trtforge.builder.planning.gpus import Compute
from trtforge.builder.planning.model_shape import ModelShape
from trtforge.builder.planning.ranks import Stage, Weight
from trtforge.errors import ConfigError

Bound = Literal["memory", "compute", "link"]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step, by what they are spent on."""

    memory_s: float  # in parts that memory bounds
    compute_s: float  # in parts that matrix units bound
    link_s: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.memory_s + self.compute_s + self.link_s

    @property
    def bound(self) -> Bound:
        """What takes the most of it."""
        times: dict[Bound, float] = {
            "memory": self.memory_s,
            "compute": self.compute_s,
            "link": self.link_s,
        }
        return max(times, key=lambda bound: times[bound])

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(
            self.memory_s + other.memory_s, self.compute_s + other.compute_s, self.link_s + other.link_s
        )


NO_TIME = StepTime(0.0, 0.0, 0.0)


def expected_experts(copies: int, active: int, num_tokens: int) -> float:
    """Distinct experts that tokens use if each takes `active` of `copies`, independently and all alike."""
    return copies * (1.0 - (1.0 - active / copies) ** num_tokens)


class Roofline:
    """Times of one deployment of one model, on a GPU whose rates are known.

    Raises ConfigError if the deployment multiplies in FP8 and the GPU cannot.
    """

    def __init__(
        self, model: ModelShape, deployment: Deployment, stages: tuple[Stage, ...], compute: Compute
    ) -> None:
        self._model = model
        self._deployment = deployment
        self._stages = stages
        self._compute = compute
        uses_fp8 = any(weight.in_fp8 for stage in stages for weight, _ in stage.weights)
        if uses_fp8 and compute.flops_fp8 is None:
            raise ConfigError(f"{deployment.gpu.title} has no FP8 matmuls: plan FP8 weights alone, or INT4")
        self._fp8_flops_per_s = compute.flops_fp8 or 0.0

    def decode(self, batch: int, context_len: int) -> StepTime:
        """One new token for each of `batch` sequences that have `context_len` tokens with it."""
        seen = {
            window: (batch * _visible(context_len, window),) * 2
            for stage in self._stages
            for window in stage.attention
        }
        return self._step(num_tokens=batch, num_logits=batch, seen=seen)

    def prefill(self, prompt_len: int) -> StepTime:
        """A prompt alone on the machine, in chunks of max_num_batched_tokens, up to its first token."""
        total = NO_TIME
        chunk = self._deployment.limits.max_num_batched_tokens
        for start in range(0, prompt_len, chunk):
            end = min(start + chunk, prompt_len)
            seen = {
                window: (_pairs(start, end, window), min(end, end - start - 1 + (window or end)))
                for stage in self._stages
                for window in stage.attention
            }
            total += self._step(num_tokens=end - start, num_logits=int(end == prompt_len), seen=seen)
        return total

    def ridge_batch(self, limit: int = 2**20) -> int | None:
        """The smallest batch whose matmuls take at least as long to compute as their weights to read.

        Attention is left out, whose bytes grow with the batch. None if no batch below `limit` does.
        """

        def is_compute_bound(batch: int) -> bool:
            parts = [part for stage in self._stages for part in self._matmul_parts(stage, batch, batch)]
            return sum(compute for _, compute in parts) >= sum(memory for memory, _ in parts)

        high = 1
        while not is_compute_bound(high):
            high *= 2
            if high > limit:
                return None
        low = high // 2  # not compute-bound, or 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_compute_bound(middle) else (middle, high)
        return high

    def _step(self, num_tokens: int, num_logits: int, seen: dict[int, tuple[int, int]]) -> StepTime:
        """`seen`, by window: pairs of a new token and one that it sees, and tokens read from the cache."""
        total = NO_TIME
        for stage in self._stages:
            parts = self._matmul_parts(stage, num_tokens, num_logits)
            parts.append(self._attention_part(stage, num_tokens, seen))
            for memory_s, compute_s in parts:
                total += StepTime(memory_s, 0, 0) if memory_s > compute_s else StepTime(0, compute_s, 0)
        return total + StepTime(0, 0, self._link_s(num_tokens, num_logits))

    def _matmul_parts(self, stage: Stage, num_tokens: int, num_logits: int) -> list[tuple[float, float]]:
        """Seconds of bytes and of operations: of projections, experts and the output embedding."""
        dense_bytes, expert_bytes = float(stage.other_bytes), 0.0
        dense_s = expert_s = 0.0
        for weight, count in stage.weights:
            compute_s = count * num_tokens * weight.active * weight.flops / self._flops_per_s(weight)
            if weight.copies > 1:
                used = expected_experts(weight.copies, weight.active, num_tokens)
                expert_bytes += count * used * weight.nbytes
                expert_s += compute_s
            else:
                dense_bytes += count * weight.nbytes
                dense_s += compute_s
        parts = [(self._memory_s(dense_bytes), dense_s), (self._memory_s(expert_bytes), expert_s)]
        if stage.head is not None and num_logits:
            head_s = num_logits * stage.head.flops / self._flops_per_s(stage.head)
            parts.append((self._memory_s(stage.head.nbytes), head_s))
        return parts

    def _attention_part(
        self, stage: Stage, num_tokens: int, seen: dict[int, tuple[int, int]]
    ) -> tuple[float, float]:
        nbytes = sum((seen[window][1] + num_tokens) * size for window, (_, size) in stage.attention.items())
        flops = sum(seen[window][0] * count for window, (count, _) in stage.attention.items())
        return self._memory_s(nbytes), flops / (self._compute.flops_16bit * self._deployment.efficiency)

    def _link_s(self, num_tokens: int, num_logits: int) -> float:
        """Rings: a rank sends 2 (tp - 1) / tp of what is summed, (tp - 1) / tp of what is gathered."""
        tp, hidden = self._deployment.tp, self._model.hidden_size
        state_bytes = num_tokens * hidden * ACTIVATION_BYTES
        num_sums = 2 * len(self._model.layers) + 1  # attention and MLP of each layer, the input embedding
        nbytes = num_sums * 2 * (tp - 1) / tp * state_bytes
        nbytes += (tp - 1) / tp * num_logits * self._model.vocab_size * LOGIT_BYTES
        nbytes += (self._deployment.pp - 1) * state_bytes
        return nbytes / (self._compute.link_bytes_per_s * self._deployment.efficiency)

    def _memory_s(self, nbytes: float) -> float:
        return nbytes / (self._compute.bandwidth_bytes_per_s * self._deployment.efficiency)

    def _flops_per_s(self, weight: Weight) -> float:
        rate = self._fp8_flops_per_s if weight.in_fp8 else self._compute.flops_16bit
        return rate * self._deployment.efficiency


def _visible(position: int, window: int) -> int:
    """Tokens that the token at `position`, counted from 1, sees."""
    return min(position, window) if window else position


def _pairs(start: int, end: int, window: int) -> int:
    """Pairs of a token from `start` to `end` (not included) and one that it sees, itself included."""

    def up_to(count: int) -> int:  # of the first `count` tokens
        full = min(count, window) if window else count
        return full * (full + 1) // 2 + (count - full) * window

    return up_to(end) - up_to(start)

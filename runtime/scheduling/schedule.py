"""What a step may be, and what it is: the scheduler's bounds and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtforge.runtime.scheduling.block_moves import BlockMoves
from trtforge.runtime.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step, of a sequence and of the queue."""

    max_model_len: int  # tokens
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue_size: int = 1 << 30
    reserves_blocks: bool = False  # admits only what can never lead to preemption
    swaps: bool = False  # preempted sequences go to host memory as long as there is room


@dataclass(slots=True)
class SchedulerOutput:
    """One step: which sequences run, in the order their tokens are packed.

    The lists are parallel. The tokens of a sequence are those from `starts` on; its `num_computed_tokens`
    counts them already. A sequence `samples` if they are the last it has: the step gives its next one.
    """

    sequences: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)  # those that were waiting before
    moves: BlockMoves = field(default_factory=BlockMoves)
    rows_with_state: list[int] = field(default_factory=list)  # indices of sequences with sampling options
    is_plain: bool = True  # one row of logits, and one token from it at most, for each sequence

    def end(self, index: int) -> int:
        """How many tokens of the sequence at `index` are computed after the step."""
        return self.starts[index] + self.num_scheduled_tokens[index]

    def drop_finished(self) -> None:
        """Take out the sequences that have finished since they were scheduled."""
        kept = [index for index, sequence in enumerate(self.sequences) if sequence.status != "finished"]
        if len(kept) < len(self.sequences):
            self.sequences = [self.sequences[index] for index in kept]
            self.starts = [self.starts[index] for index in kept]
            self.num_scheduled_tokens = [self.num_scheduled_tokens[index] for index in kept]
            self.samples = [self.samples[index] for index in kept]
            self.rows_with_state = [
                row for row, sequence in enumerate(self.sequences) if sequence.sampling_state is not None
            ]

    def append(self, sequence: Sequence, num_tokens: int) -> None:
        """Schedule the sequence's next tokens."""
        if sequence.sampling_state is not None:
            self.rows_with_state.append(len(self.sequences))
        self.sequences.append(sequence)
        self.starts.append(sequence.num_computed_tokens)
        self.num_scheduled_tokens.append(num_tokens)
        sequence.num_computed_tokens += num_tokens
        self.samples.append(sequence.num_computed_tokens == len(sequence.token_ids))
        if sequence.num_draft_tokens or sequence.followers or sequence.sampling.prompt_logprobs is not None:
            self.is_plain = False

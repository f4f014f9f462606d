"""What every option that changes logits is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Float32Array


@dataclass(frozen=True, slots=True)
class History:
    """The tokens that one row of logits continues: the first `length` of `token_ids`.

    Of them `num_accepted` are the sequence's for good; the others are drafts, taken as accepted in this row.
    """

    token_ids: array[int]
    length: int
    num_prompt_tokens: int
    num_accepted: int

    @property
    def position(self) -> int:
        """How many tokens of the answer come before the one to sample."""
        return self.length - self.num_prompt_tokens

    @property
    def drafts(self) -> array[int]:
        """The tokens that are not accepted yet."""
        return self.token_ids[self.num_accepted : self.length]

    def last(self, num_tokens: int) -> npt.NDArray[np.int32]:
        """The last tokens of the history; the first tokens if there are not so many. A copy: a view would
        keep `token_ids` from growing."""
        start = max(self.length - num_tokens, 0)
        return np.asarray(self.token_ids[start : self.length], dtype=np.int32)


class LogitsProcessor(ABC):
    """One option of one sequence. May keep what it knows of the accepted tokens, never of drafts."""

    @abstractmethod
    def apply(self, logits: Float32Array, history: History) -> None:
        """Change the logits [vocab_size] of one row in place; -inf forbids a token."""

    def accept(self, token_ids: Sequence[int]) -> None:  # noqa: B027  # most options keep nothing
        """Take note of tokens that the answer got for good."""

    def fork(self) -> LogitsProcessor:
        """The same for another answer to the same prompt, as long as nothing was accepted."""
        return self

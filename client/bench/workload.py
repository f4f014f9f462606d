"""The requests of a run: their prompts and how many tokens each asks for, the same for the same seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trtforge.client.bench.lengths import IntArray, Length, LognormalLength, clip_lengths
from trtforge.client.protocol import Prompt
from trtforge.errors import ConfigError, RequestError

PromptForm = Literal["ids", "text"]
WARM_UP = 0  # the number of the warm-up among the runs of a command

# What a seed is used for: each has a stream of random numbers of its own.
_LENGTHS, _PROMPTS, _PREFIX, _ROWS = range(4)
# Short, frequent words: about one token each in the vocabularies of language models.
_FREQUENT = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but "
    "what all were when we there can an your which their said if do will each about how up out them then she "
    "many some so these would other into has more her two like him see time could no make than first been"
)
_WORDS = _FREQUENT.split()


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request to send."""

    index: int
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What to send. Lengths are in tokens, those of prompts of form "text" in words."""

    num_requests: int
    seed: int
    input_length: Length
    output_length: Length
    vocab_size: int
    shared_prefix_tokens: int = 0  # in front of every prompt, beside its own length
    max_model_len: int | None = None
    prompt_form: PromptForm = "ids"
    dataset: Path | None = None  # JSON lines, instead of random prompts

    def requests(self, run: int) -> list[BenchRequest]:
        """The requests of a run of a sweep.

        Runs differ in their random prompts, so that no cache of prefixes carries over, not in their
        lengths. Prompts of a dataset and the shared prefix are the same in all runs. Raises ConfigError.
        """
        rng = np.random.default_rng([self.seed, _LENGTHS])
        inputs = self.input_length.sample(self.num_requests, rng)
        outputs = self.output_length.sample(self.num_requests, rng)
        if self.dataset is not None:
            return self._from_dataset(load_dataset(self.dataset), outputs)
        if self.max_model_len is not None and isinstance(self.input_length, LognormalLength):
            room = self.max_model_len - self.shared_prefix_tokens
            if room < 2:
                raise ConfigError(
                    f"a shared prefix of {self.shared_prefix_tokens} tokens leaves no room in sequences of "
                    f"{self.max_model_len}"
                )
            inputs, outputs = clip_lengths(inputs, outputs, room)
        prefix = self._tokens(self.shared_prefix_tokens, np.random.default_rng([self.seed, _PREFIX]))
        rng = np.random.default_rng([self.seed, _PROMPTS, run])
        return [
            BenchRequest(index, self._prompt(prefix + self._tokens(int(length), rng)), int(max_tokens))
            for index, (length, max_tokens) in enumerate(zip(inputs, outputs, strict=True))
        ]

    def _tokens(self, num: int, rng: np.random.Generator) -> list[int]:
        return [int(token_id) for token_id in rng.integers(0, self.vocab_size, num)]

    def _prompt(self, token_ids: list[int]) -> Prompt:
        if self.prompt_form == "ids":
            return Prompt(input_ids=token_ids)
        return Prompt(text=" ".join(_WORDS[token_id % len(_WORDS)] for token_id in token_ids))

    def _from_dataset(self, rows: Sequence[DatasetRow], outputs: IntArray) -> list[BenchRequest]:
        # Whole rounds through the file, each in an order of its own.
        rng = np.random.default_rng([self.seed, _ROWS])
        rounds = -(-self.num_requests // len(rows))
        order = np.concatenate([rng.permutation(len(rows)) for _ in range(rounds)])
        return [
            BenchRequest(index, rows[row].as_prompt(), rows[row].max_tokens or int(output))
            for index, (row, output) in enumerate(zip(order, outputs, strict=False))
        ]


class DatasetRow(BaseModel):
    """A line of a dataset: one of `prompt`, `messages` and `input_ids`, and the answer's length if known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    input_ids: tuple[int, ...] | None = None
    max_tokens: int | None = Field(default=None, ge=1)

    def as_prompt(self) -> Prompt:
        """Raises RequestError unless exactly one of the three is given."""
        return Prompt(self.prompt, self.messages, self.input_ids)


def load_dataset(path: Path) -> list[DatasetRow]:
    """The rows of a file of JSON lines; empty lines are skipped. Raises ConfigError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the dataset {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = DatasetRow.model_validate_json(line)
                row.as_prompt()
            except (ValidationError, RequestError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                raise ConfigError(f"{path}, line {number}: {reason}") from error
            rows.append(row)
    if not rows:
        raise ConfigError(f"the dataset {path} has no prompts")
    return rows

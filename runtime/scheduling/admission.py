"""Whether a waiting sequence may start beside those that run."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from trtforge.errors import ConfigError, RequestError
from trtforge.runtime.scheduling.kv_cache_manager import KVCacheManager
from trtforge.runtime.scheduling.schedule import SchedulerLimits
from trtforge.runtime.scheduling.sequence import Sequence


class Admission:
    """Counts what the running sequences stand for, and admits others unless that makes preemption likely.

    A sequence gets the blocks of all its known tokens at once: a prefill never stops for want of blocks.
    One more block for every sequence already running is left free, so that they grow by a block before a
    sequence admitted now could be preempted and its prefill wasted. With `reserves_blocks` a sequence is
    admitted only if there are blocks for all that it and the running ones come to need.
    """

    def __init__(self, kv_cache: KVCacheManager, limits: SchedulerLimits) -> None:
        """Raises ConfigError if the cache can't hold one sequence of `max_model_len` tokens."""
        if kv_cache.max_sequences(limits.max_model_len) < 1:
            raise ConfigError(
                f"one sequence of max_model_len {limits.max_model_len} tokens needs "
                f"{kv_cache.num_blocks_for(limits.max_model_len)} cache blocks, there are "
                f"{kv_cache.num_blocks}: lower max_model_len or enlarge the cache"
            )
        self._kv_cache = kv_cache
        self._limits = limits
        self._num_reserved_blocks = 0  # that the running sequences may come to need
        self._blocked: tuple[Sequence, int] | None = None  # who did not fit, and how many blocks were free
        self.num_answers = 0  # that the running sequences stand for

    def check(self, sequence: Sequence) -> None:
        """Raise RequestError if the answers of a new sequence can never run together."""
        if sequence.num_answers > self._limits.max_num_seqs:
            raise RequestError(
                f"n is {sequence.num_answers}: this model runs at most {self._limits.max_num_seqs} answers "
                "at once"
            )
        reserve = self._reserve(sequence)
        if self._limits.reserves_blocks and reserve > self._kv_cache.num_blocks:
            raise RequestError(
                f"n {sequence.num_answers} and max_tokens can come to need {reserve} cache blocks, there are "
                f"{self._kv_cache.num_blocks}: ask for fewer answers or tokens"
            )

    def admit(self, sequence: Sequence, num_running: int) -> bool:
        """Give a waiting sequence its blocks and count it as running; False if it may not start now."""
        num_free = self._kv_cache.num_free_blocks
        if self.num_answers + sequence.num_answers > self._limits.max_num_seqs:
            return False
        if self._blocked is not None and self._blocked[0] is sequence and num_free <= self._blocked[1]:
            return False
        if self._limits.reserves_blocks:
            num_spare = 0
            fits = self._num_reserved_blocks + self._reserve(sequence) <= self._kv_cache.num_blocks
        else:
            num_spare = num_running
            fits = True
        if not fits or not self._kv_cache.admit(sequence, num_spare):
            self._blocked = (sequence, num_free)
            return False
        self._blocked = None
        self._count(sequence, 1)
        return True

    def would_fit(self, sequence: Sequence, num_running: int, without: SequenceOf[Sequence]) -> bool:
        """Whether a waiting sequence could start if those in `without` ran no more, as far as it can be told:
        they may share blocks.
        """
        num_answers = self.num_answers - sum(other.num_answers for other in without)
        num_reserved = self._num_reserved_blocks - sum(map(self._reserve, without))
        num_free = self._kv_cache.num_free_blocks + sum(len(other.block_table) for other in without)
        num_needed = self._kv_cache.num_blocks_for(len(sequence.token_ids))
        if self._limits.reserves_blocks:
            num_free, num_needed = self._kv_cache.num_blocks - num_reserved, self._reserve(sequence)
        else:
            num_needed += num_running - len(without)
        return num_answers + sequence.num_answers <= self._limits.max_num_seqs and num_needed <= num_free

    def leave(self, sequence: Sequence) -> None:
        """A running sequence runs no more."""
        self._count(sequence, -1)

    def reconsider(self) -> None:
        """Who did not fit may do so now, though no more blocks are free."""
        self._blocked = None

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """Raise RuntimeError if what is counted is not what runs."""
        if self.num_answers != sum(sequence.num_answers for sequence in running):
            raise RuntimeError(f"{self.num_answers} answers are counted, but others run")
        if self._num_reserved_blocks != sum(map(self._reserve, running)):
            raise RuntimeError(f"{self._num_reserved_blocks} blocks are reserved, but not for those that run")

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.num_answers += sign * sequence.num_answers
        self._num_reserved_blocks += sign * self._reserve(sequence)

    def _reserve(self, sequence: Sequence) -> int:
        """Blocks that the sequence and its followers come to need at most."""
        return sequence.num_answers * self._kv_cache.num_blocks_for(sequence.max_num_tokens)

"""An executor without a model, for testing everything around it."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from trtforge.runtime.executor import Int32Array, KVCacheSpec, ModelInputs, ModelOutputs
from trtforge.runtime.executors.cache_arrays import move_blocks
from trtforge.runtime.scheduling.block_moves import BlockMoves

# The possible rows of logits are windows into one table of noise; bits of a hash choose one.
_WINDOW_BITS = 16
_NUM_WINDOWS = 1 << _WINDOW_BITS
_EMPTY = -1


class FakeExecutor:
    """Logits are a fixed pseudo-random function of a sequence's whole history of tokens.

    The history is what the paged cache holds at the moment: tokens are stored through slot_mapping
    and read back through block_tables and context_lens. Wrong slots, tables, positions or recompute
    are refused where they contradict each other and change the logits otherwise.
    """

    def __init__(
        self,
        vocab_size: int,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        window: int | None = None,
        step_delay_s: float = 0.0,
        columns: tuple[int, int] | None = None,
    ) -> None:
        """Logits depend on the last `window` tokens, or all; `step_delay_s` is slept in every step. `columns`
        are start and stop of the tokens whose logits are returned, of all by default."""
        self._spec = KVCacheSpec(block_size, num_blocks, num_host_blocks)
        self._window = window
        self._step_delay_s = step_delay_s
        self._columns = None if columns is None else slice(*columns)
        num_slots = num_blocks * block_size
        self._token_ids = np.full(num_slots, _EMPTY, dtype=np.int32)
        self._position_ids = np.full(num_slots, _EMPTY, dtype=np.int32)
        self._host_blocks = np.full((2, num_host_blocks, block_size), _EMPTY, dtype=np.int32)
        # Two streams, so that the logits do not depend on the size of the cache.
        noise = np.random.default_rng(0).standard_normal(vocab_size + _NUM_WINDOWS - 1, dtype=np.float32)
        self._windows = np.lib.stride_tricks.sliding_window_view(noise, vocab_size)
        self._argmaxes = np.full(_NUM_WINDOWS, _EMPTY, dtype=np.int32)  # as far as they were asked for
        self._hash_factors = np.random.default_rng(1).integers(1 << 64, size=num_slots, dtype=np.uint64)

    def kv_cache_spec(self) -> KVCacheSpec:
        """The cache as given to the constructor."""
        return self._spec

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move tokens and positions."""
        for array, host in zip((self._token_ids, self._position_ids), self._host_blocks, strict=True):
            move_blocks(moves, array.reshape(-1, self._spec.block_size), host)

    def execute(self, inputs: ModelInputs) -> ModelOutputs:
        """Store the new tokens, hash the wanted histories.

        Raises ValueError, before anything is stored, for inputs that contradict each other or point
        outside the cache, and for a history that the cache does not hold.
        """
        time.sleep(self._step_delay_s)
        rows = self._check(inputs)
        stored = inputs.slot_mapping >= 0
        self._token_ids[inputs.slot_mapping[stored]] = inputs.input_ids[stored]
        self._position_ids[inputs.slot_mapping[stored]] = inputs.position_ids[stored]

        wanted = inputs.logits_indices
        hashes = self._hash_histories(inputs.block_tables[rows[wanted]], inputs.position_ids[wanted] + 1)
        windows = (hashes >> np.uint64(64 - _WINDOW_BITS)).astype(np.int64)
        if self._columns is not None:
            return ModelOutputs(logits=self._windows[windows, self._columns])
        return ModelOutputs(logits=self._windows[windows], argmax=self._argmax(windows))

    def close(self) -> None:
        """Nothing to release."""

    def _argmax(self, windows: npt.NDArray[np.int64]) -> Int32Array:
        for window in windows[self._argmaxes[windows] == _EMPTY]:
            self._argmaxes[window] = self._windows[window].argmax()
        return self._argmaxes[windows]

    def _hash_histories(self, block_tables: Int32Array, lengths: Int32Array) -> npt.NDArray[np.uint64]:
        """[R]: a hash of the first `lengths` [R] tokens that the cache holds for `block_tables` [R, *]."""
        positions = np.arange(lengths.max())
        block_size = self._spec.block_size
        slots = block_tables[:, positions // block_size] * block_size + positions % block_size  # [R, L]
        in_history = positions < lengths[:, None]
        if self._window is not None:
            in_history &= positions >= lengths[:, None] - self._window
        wrong = in_history & (self._position_ids[slots] != positions)
        if wrong.any():
            row, position = np.argwhere(wrong)[0]
            slot = slots[row, position]
            raise ValueError(
                f"slot {slot} should hold position {position} of row {row}, "
                f"it holds position {self._position_ids[slot]}"
            )
        terms = (self._token_ids[slots] + 1).astype(np.uint64) * self._hash_factors[positions]
        hashes: npt.NDArray[np.uint64] = np.where(in_history, terms, np.uint64(0)).sum(axis=1)
        return hashes

    def _check(self, inputs: ModelInputs) -> npt.NDArray[np.int64]:
        """Raise ValueError unless the arrays agree; returns for each token the row of its sequence [T]."""
        num_tokens, num_seqs = len(inputs.input_ids), len(inputs.context_lens)
        num_new = np.diff(inputs.cu_seqlens)
        for name in ModelInputs.__slots__:
            array = getattr(inputs, name)
            _require(array.dtype == np.int32 and array.flags.c_contiguous, f"{name} is not contiguous int32")
        _require(inputs.cu_seqlens.shape == (num_seqs + 1,), "cu_seqlens is not [B + 1]")
        _require(inputs.cu_seqlens[0] == 0 and inputs.cu_seqlens[-1] == num_tokens, "cu_seqlens is not 0..T")
        _require(bool((num_new > 0).all()), "a sequence has no new token")
        _require(inputs.slot_mapping.shape == (num_tokens,), "slot_mapping is not [T]")
        _require(len(inputs.logits_indices) > 0, "no logits are wanted")
        _require_range("logits_indices", inputs.logits_indices, num_tokens)
        _require_range("input_ids", inputs.input_ids, self._windows.shape[1])

        rows = np.repeat(np.arange(num_seqs), num_new)
        expected = np.arange(num_tokens) + (inputs.context_lens - inputs.cu_seqlens[1:])[rows]
        _require_equal("position_ids", inputs.position_ids, expected)
        self._check_slots(inputs, rows)
        return rows

    def _check_slots(self, inputs: ModelInputs, rows: npt.NDArray[np.int64]) -> None:
        block_size = self._spec.block_size
        num_blocks_used = -(-inputs.context_lens // block_size)
        width = inputs.block_tables.shape[1]
        _require(int(num_blocks_used.max()) <= width, f"{width} blocks a table do not hold context_lens")
        used = inputs.block_tables[np.arange(width) < num_blocks_used[:, None]]
        _require_range("block_tables", used, self._spec.num_blocks)

        stored = inputs.slot_mapping >= 0
        positions, slots = inputs.position_ids[stored], inputs.slot_mapping[stored]
        blocks = inputs.block_tables[rows[stored], positions // block_size]
        _require_equal("slot_mapping", slots, blocks * block_size + positions % block_size)
        _require(len(np.unique(slots)) == len(slots), "a slot is written twice")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _require_range(name: str, array: Int32Array, end: int) -> None:
    _require(bool(((array >= 0) & (array < end)).all()), f"{name} has values outside 0..{end - 1}")


def _require_equal(name: str, array: Int32Array, expected: npt.NDArray[np.int64]) -> None:
    _require(array.shape == expected.shape and bool((array == expected).all()), f"{name} is not {expected}")

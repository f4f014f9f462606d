"""What tests of executors share: sequences fed step by step, and a tiny model for OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trtforge.builder.checkpoint import Checkpoint
from trtforge.builder.export import export_model, write_graph
from trtforge.manifest import DType, KVCacheLayout, LayerCache, Limits, Manifest, ModelInfo, Rank
from trtforge.runtime.executor import Executor, Float32Array, ModelInputs

VOCAB_SIZE = 128


class SequenceDriver:
    """Feeds sequences to an executor step by step, with block tables of its own."""

    def __init__(self, executor: Executor, block_order: Iterable[int] | None = None) -> None:
        """Blocks are given out in `block_order`, by default in ascending order."""
        spec = executor.kv_cache_spec()
        self._executor = executor
        self._block_size = spec.block_size
        self._free_blocks = list(range(spec.num_blocks) if block_order is None else block_order)[::-1]
        self._tokens: dict[str, list[int]] = {}
        self._blocks: dict[str, list[int]] = {}

    def inputs(
        self, new_tokens: Mapping[str, Sequence[int]], logits_indices: Sequence[int] | None = None
    ) -> ModelInputs:
        """Append tokens to sequences; by default the logits of all of them are wanted."""
        positions: list[int] = []
        slots: list[int] = []
        for name, new in new_tokens.items():
            tokens, blocks = self._tokens.setdefault(name, []), self._blocks.setdefault(name, [])
            new_positions = range(len(tokens), len(tokens) + len(new))
            tokens += new
            while len(blocks) * self._block_size < len(tokens):
                blocks.append(self._free_blocks.pop())
            positions += new_positions
            slots += [
                blocks[position // self._block_size] * self._block_size + position % self._block_size
                for position in new_positions
            ]
        tables = np.zeros((len(new_tokens), max(len(self._blocks[name]) for name in new_tokens)), np.int32)
        for row, name in enumerate(new_tokens):
            tables[row, : len(self._blocks[name])] = self._blocks[name]
        return ModelInputs(
            input_ids=np.concatenate([np.asarray(new, np.int32) for new in new_tokens.values()]),
            position_ids=np.asarray(positions, np.int32),
            block_tables=tables,
            cu_seqlens=np.cumsum([0, *map(len, new_tokens.values())], dtype=np.int32),
            context_lens=np.asarray([len(self._tokens[name]) for name in new_tokens], np.int32),
            slot_mapping=np.asarray(slots, np.int32),
            logits_indices=np.asarray(
                range(len(positions)) if logits_indices is None else logits_indices, np.int32
            ),
        )

    def step(self, new_tokens: Mapping[str, Sequence[int]]) -> dict[str, Float32Array]:
        """Run one step; returns the logits of each sequence's new tokens, [new, vocab_size]."""
        logits = self._executor.execute(self.inputs(new_tokens)).logits.copy()
        ends = np.cumsum([len(new) for new in new_tokens.values()])
        return dict(zip(new_tokens, np.split(logits, ends[:-1]), strict=True))

    def run(self, schedule: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, Float32Array]:
        """Run many steps; returns the logits of each sequence's tokens, [its tokens, vocab_size]."""
        rows: dict[str, list[Float32Array]] = {}
        for new_tokens in schedule:
            for name, logits in self.step(new_tokens).items():
                rows.setdefault(name, []).append(logits)
        return {name: np.concatenate(logits) for name, logits in rows.items()}

    def free(self, name: str) -> None:
        """Forget a sequence; its blocks are the next ones given out."""
        del self._tokens[name]
        self._free_blocks += self._blocks.pop(name)


@pytest.fixture(scope="session")
def drive() -> type[SequenceDriver]:
    """`drive(executor, block_order=None)`: a SequenceDriver without sequences."""
    return SequenceDriver


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """`make_manifest(layers, dtype=..., ...)`: the manifest of a model.onnx for the openvino runtime."""

    def make(
        layers: tuple[LayerCache, ...],
        *,
        dtype: DType = "float32",
        kv_cache_dtype: DType | None = None,
        block_size: int = 32,
        num_blocks: int = 24,
        vocab_size: int = VOCAB_SIZE,
    ) -> Manifest:
        return Manifest(
            trtforge_version="0",
            build_key="test",
            runtime="openvino",
            dtype=dtype,
            model=ModelInfo(
                name="tiny", architecture="Tiny", vocab_size=vocab_size, num_parameters=1, eos_token_ids=()
            ),
            kv_cache=KVCacheLayout(
                dtype=kv_cache_dtype or dtype, block_size=block_size, num_blocks=num_blocks, layers=layers
            ),
            limits=Limits(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512),
            ranks=(Rank(onnx="model.onnx"),),
            files={},
        )

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random llama of VOCAB_SIZE tokens, 4 heads and 2 KV heads."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # far from uniform attention and logits, which a fresh model has
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def export_tiny_llama(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, make_manifest: Callable[..., Manifest]
) -> Callable[[DType], tuple[Path, Manifest]]:
    """`export_tiny_llama(dtype)`: the folder of its graph and its manifest; made once for each dtype."""
    made: dict[DType, tuple[Path, Manifest]] = {}

    def export(dtype: DType) -> tuple[Path, Manifest]:
        if dtype not in made:
            folder = tmp_path_factory.mktemp(dtype)
            exported = export_model(Checkpoint.open(str(tiny_llama)), dtype)
            write_graph(exported, folder)
            made[dtype] = folder, make_manifest(exported.layers, dtype=dtype)
        return made[dtype]

    return export


@pytest.fixture(scope="session")
def tensorrt_rtx() -> ModuleType:
    """The package; tests that need it are skipped where it is not installed."""
    return pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")

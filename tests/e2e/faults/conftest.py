"""A server that tests of this folder share, and whose engine can be made to hang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.servers import (
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    USE_HANGING_ENGINE,
    MakeRepository,
    Served,
    serving,
    set_parameters,
)


@pytest.fixture(scope="module")
def repository(make_fake_repository: MakeRepository) -> Path:
    """Requests that no test waits for fit in; a prompt that starts with HANG makes a step hang."""
    repository = make_fake_repository(num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, max_num_seqs=8)
    set_parameters(repository, step_timeout_s=2, prefix_caching="false")
    model = repository / "llm" / "1" / "model.py"
    model.write_text(model.read_text() + USE_HANGING_ENGINE)
    return repository


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[Served]:
    with serving(repository, "--exit-timeout=2", "--max-restarts=9") as served:
        yield served

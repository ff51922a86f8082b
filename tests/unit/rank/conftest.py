"""What tests of a rank's parts run on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checkpoints import ARCHITECTURES, make_checkpoint
from support.rank_link import open_rank_link
from tpmodel_worker.arenas.client import ArenaClient


@pytest.fixture
def arenas() -> Iterator[ArenaClient]:
    """A supervisor's memory."""
    with open_rank_link() as link, ArenaClient(link.path) as client:
        yield client


@pytest.fixture(scope="session")
def hybrid_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with recurrent state."""
    return make_checkpoint(tmp_path_factory.mktemp("hybrid"), **ARCHITECTURES["qwen3_5"])

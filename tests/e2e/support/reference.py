"""What `tpmodel serve` answers on this machine: the measure of what the cluster answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.cluster import checkpoints
from tests.e2e.support.manifests import DTYPE
from tpmodel import Client
from tpmodel.local import LocalServer

OPTIONS = ("--dtype", DTYPE, "--kv-cache-memory", "64M")
SEED = 4
VOCABULARY = 2048


def prompts(count: int, *, length: int = 12) -> list[list[int]]:
    """Token ids, always the same."""
    source = random.Random(SEED)
    return [[source.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]


def local_answers(given: Sequence[Sequence[int]], *, ranks: int = 2, **options: Any) -> list[list[int]]:
    """Token ids of each prompt's answer, of as many ranks as the cluster's gangs have."""
    with LocalServer(checkpoints.DEFAULT_MODEL, tp=ranks, device="cpu", options=OPTIONS) as server:
        with Client(server.target) as client:
            return [list(client.complete(list(prompt), **options).token_ids[0]) for prompt in given]

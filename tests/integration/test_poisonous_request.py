"""A request that kills the ranks that compute it, every time: it fails, and nothing else does."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.chaos_server import ChaosServer
from support.checkpoints import BASE, make_checkpoint
from tpmodel import Client, TpmodelError

POISON = BASE["vocab_size"] - 1
HARMLESS = 40
TOKENS = 200
LIMIT = 4
"""Rebuilds: enough for one such request."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosServer]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("poison") / "model", initializer_range=0.05)
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as folder:
        settings = {"kv_cache_bytes": 8_000_000, "max_num_seqs": 8, "max_model_len": 512, "rebuild_limit": LIMIT}
        server = ChaosServer(Path(folder), checkpoint, tp=2, **settings)
        server.start()
        try:
            server.wait_serving()
            yield server
        finally:
            server.close()


def prompt(number: int) -> list[int]:
    return [2 + number, *range(10, HARMLESS)]


def test_a_request_that_kills_every_world_fails_once_and_the_others_go_on(server: ChaosServer) -> None:
    """W26, P17; DESIGN section 6: no rebuild is spent on it any more, the client does not send it again, and the
    requests that ran and came beside it bring what they bring undisturbed."""
    options = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
    with Client(server.target) as client:
        undisturbed = [client.complete(prompt(number), **options).token_ids for number in range(4)]
    server.poison(POISON)
    with ThreadPoolExecutor(5) as threads, Client(server.target) as client:
        begun = threading.Event()

        def run(number: int) -> object:
            stream = client.generate(prompt(number), **options)
            for _ in stream:
                begun.set()
            return stream.result().token_ids

        running = [threads.submit(run, number) for number in range(2)]
        assert begun.wait(30)
        poisonous = threads.submit(client.complete, [POISON, 3, 4], max_tokens=5)
        running += [threads.submit(run, number) for number in range(2, 4)]
        error = poisonous.exception(60)
        assert isinstance(error, TpmodelError)
        assert error.code == "INTERNAL"
        assert "3 worlds in a row were lost while they computed this request" in str(error)
        assert [future.result(60) for future in running] == undisturbed
    server.wait_serving()
    status = server.status()
    assert status.engine.rebuilds_left == LIMIT - 3
    assert "is failed: worlds are lost while they compute it" in server.output

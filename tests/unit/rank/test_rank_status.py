"""What a rank says of itself."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.compilation import announce_compilations
from tpmodel_worker.rank.status import StatusBoard


@pytest.fixture
def status() -> StatusBoard:
    return StatusBoard(rank=3, device="cuda:1", threads=2)


def test_ping_names_the_rank_and_the_epoch(status: StatusBoard) -> None:
    """P5"""
    assert status.ping(9) == pb.PingResponse(rank=3, epoch=9)


def test_a_status_is_a_copy(status: StatusBoard) -> None:
    before = status.status()
    status.update(state="loading", kv_blocks=7)
    status.progress(pb.Progress(what="weights", done_bytes=1, total_bytes=2))
    assert (before.rank, before.device, before.threads, before.state) == (3, "cuda:1", 2, "idle")
    after = status.status()
    assert (after.state, after.kv_blocks, after.progress.total_bytes) == ("loading", 7, 2)
    status.progress(None)
    assert not status.status().HasField("progress")


def test_compiling_shows_as_busy_until_it_is_done(status: StatusBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """P17"""
    knobs = pytest.importorskip("triton.knobs")
    for hook in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(knobs.runtime, hook, None)
    announce_compilations(status)
    assert not knobs.runtime.jit_cache_hook(fn=SimpleNamespace(name="attention"), key="")
    busy = status.ping(1).busy
    assert busy.what == "compiling attention"
    assert time.time() + 60 < busy.until < time.time() + 300
    knobs.runtime.jit_post_compile_hook(fn=SimpleNamespace(name="attention"), key="")
    assert not status.ping(1).HasField("busy")

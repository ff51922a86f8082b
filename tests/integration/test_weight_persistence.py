"""A server whose memory is lost as a whole: what a trainer has sent comes back out of files, or is said to be lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from support.local_servers import kill_all, metric
from support.trainer import TrainedModel
from support.updated_server import TOKEN_FILE, Served, prepare, raw_stream, serve
from support.waiting import until


class Kept:
    """One checkpoint and one folder for updates, over several servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.updates = folder / "updates"
        self.trained: TrainedModel | None = None
        self.version = 0

    def remember(self, served: Served) -> None:
        self.trained, self.version = served.trained, served.version

    @property
    def model(self) -> Path:
        """The folder of this model among the updates."""
        (model,) = self.updates.iterdir()
        return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("kept"))


def options(kept: Kept) -> list[str]:
    return ["--persist-updates", str(kept.updates)]


def versions(kept: Kept) -> list[str]:
    return sorted(path.name for path in kept.model.iterdir() if path.is_dir())


def test_updates_are_kept_and_older_ones_removed_once_all_ranks_have_the_newer(kept: Kept) -> None:
    with serve(kept.folder, 2, *options(kept)) as served:
        with served.connect() as trainer:
            served.update(trainer)
            served.update(trainer)
        until(lambda: served.state().persisted_version == served.version, "the ranks have written it")
        until(lambda: versions(kept) == [str(served.version)], "the older one is removed")
        names = sorted(path.name for path in (kept.model / str(served.version)).iterdir())
        assert names == ["rank-0.json", "rank-0.weights", "rank-1.json", "rank-1.weights"]
        assert metric(served.server.metrics_url, "tpmodel_persisted_weight_version") == served.version
        kept.remember(served)
        kill_all(served.server)


def test_a_server_without_memory_comes_back_with_the_updated_weights(kept: Kept) -> None:
    """E46: digests checked; greedy output is that of transformers with the trainer's weights."""
    with serve(kept.folder, 2, *options(kept)) as served:
        assert kept.trained is not None
        served.trained, served.version = kept.trained, kept.version
        assert served.served().version == kept.version
        served.check()
        # A disk that takes nothing is said, and the gang serves on.
        aside = kept.updates.rename(kept.folder / "aside")
        kept.updates.write_text("in the way")
        with served.connect(mode="shadow") as trainer:
            served.update(trainer)
        until(lambda: "Not a directory" in served.state().persist_error, "the failure is told")
        assert metric(served.server.metrics_url, "tpmodel_weight_persist_failures_total") == 1
        assert served.ready()
        served.check()
        kept.updates.unlink()
        aside.rename(kept.updates)
        with served.connect() as trainer:
            served.update(trainer)
        until(lambda: served.state().persisted_version == served.version, "the next one is written")
        assert served.state().persist_error == ""
        until(lambda: versions(kept) == [str(served.version)], "the older one is removed")
        kept.remember(served)
        kill_all(served.server)


@pytest.fixture
def refused(kept: Kept) -> Iterator[Served]:
    """A server that is not ready, since one bit of the only version in its files has changed."""
    data = kept.model / str(kept.version) / "rank-1.weights"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    server = prepare(kept.folder, 2, *options(kept), checkpoint=kept.folder / "checkpoint")
    server.launch()
    try:
        checkpoint = kept.folder / "checkpoint"
        yield Served(
            server, TrainedModel(checkpoint), checkpoint, kept.folder / TOKEN_FILE, version=kept.version, ranks=2
        )
    finally:
        server.stop()


def test_a_version_that_is_damaged_is_refused_and_the_checkpoint_not_served_for_it(kept: Kept, refused: Served) -> None:
    """E46: WeightsLost until a full set has come."""

    def condition() -> str:
        try:
            return refused.state().weights_condition
        except grpc.RpcError:
            return "not there yet"

    until(lambda: condition() == "WeightsLost", "the loss is noticed", 90)
    assert f"version {kept.version} is lost, the ranks have 0, 0" in refused.state().weights_message
    assert "is not what was written" in refused.server.output
    served = refused.served()
    assert (served.HasField("version"), served.reason) == (False, "WeightsLost")
    assert not refused.ready()
    listening = re.search(r"gRPC on (\S+),", refused.server.output)
    assert listening is not None
    assert raw_stream(listening[1], begun=False).result(30) == grpc.StatusCode.UNAVAILABLE
    refused.heal()
    until(lambda: bool(refused.server.target), "the server is ready")
    refused.check()

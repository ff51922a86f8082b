"""Whole servers of which a rank, the engine or both are killed within the commit of a second set of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import support
from support.scale import COMMIT_DEATHS_WORLDS
from support.updated_server import PROMPTS, Served, Stream, serve
from support.waiting import until
from tpmodel.trainer import WeightUpdateError
from tpmodel.v1 import worker_pb2

HOOKS = Path(support.__file__).parent / "update_deaths"
TOKENS = 250


@dataclass(frozen=True)
class Mortal:
    """A server that kills its own processes where it is told to."""

    served: Served
    points: Path

    @property
    def last_rank(self) -> str:
        return f"rank {self.served.ranks - 1}"

    @property
    def engine(self) -> int:
        (pid,) = [process.pid for process in self.served.processes() if process.name == "engine"]
        return pid

    def prepare(self, point: str, *victims: object) -> None:
        (self.points / point).write_text(" ".join(map(str, victims)))

    def sets(self) -> list[str]:
        """Sets of weights that the supervisor holds, one name for each."""
        links = [link.readlink() for link in Path(f"/proc/{self.served.server.process.pid}/fd").iterdir()]
        return [str(link) for link in links if "weights arena" in str(link)]

    def check(self, old: dict[str, torch.Tensor], *, new: bool | None) -> None:
        """One whole version is served, which GetVersion names; an update follows, and nothing is left behind.

        new: whether it is the new version; None: either.
        """
        served = self.served
        version = served.served()
        assert version.HasField("version"), version
        if new is None:
            new = version.version == served.version
        if not new:
            served.version -= 1
            served.trained.model.load_state_dict(old)
        assert (version.version, version.newest_version) == (served.version, served.version)
        served.check()
        assert len(self.sets()) == served.ranks
        with served.connect(mode="shadow") as trainer:
            served.update(trainer)
        served.check()
        assert len(self.sets()) == served.ranks


@pytest.fixture(scope="module", params=COMMIT_DEATHS_WORLDS, ids="tp{}".format)
def mortal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortal]:
    tp: int = request.param
    points = tmp_path_factory.mktemp("points")
    hooks = {"PYTHONPATH": str(HOOKS), "UPDATE_DEATHS": str(points)}
    with serve(tmp_path_factory.mktemp("server"), tp, "--rebuild-limit", "1000", environment=hooks) as served:
        yield Mortal(served, points)


@pytest.fixture
def old(mortal: Mortal) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in mortal.served.trained.weights.items()}


def update(mortal: Mortal) -> WeightUpdateError | None:
    """A full set in mode shadow, behind which another world serves; what Finish answered."""
    served = mortal.served
    before = served.state()
    failure = None
    with served.connect(mode="shadow") as trainer:
        try:
            served.update(trainer)
        except WeightUpdateError as error:
            failure = error

    def serves_anew() -> bool:
        # Where nobody is left who knows it, the epoch begins anew.
        now = served.state()
        serves = now.phase == worker_pb2.PHASE_SERVING and now.ready_ranks == served.ranks
        return serves and (now.instance_id, now.epoch) != (before.instance_id, before.epoch)

    until(serves_anew, "another world serves", 60)
    assert not list(mortal.points.iterdir()), "nobody came to the point"
    return failure


@pytest.mark.parametrize(
    ("point", "new"),
    [
        ("before prepare", False),
        ("after prepare", False),
        ("after commit", False),
        ("before confirm", True),
        ("after confirm", True),
    ],
)
def test_a_rank_that_is_killed_leaves_the_version_that_was_decided_on(
    mortal: Mortal, old: dict[str, torch.Tensor], point: str, new: bool
) -> None:
    """E46, U35: around its own store of the second set, its commit and its confirmation; requests go on."""
    version = mortal.served.version
    stream = Stream(mortal.served.server.target, PROMPTS[0], TOKENS).begun()
    mortal.prepare(f"{mortal.last_rank} {point}", "self")
    failure = update(mortal)
    if new:
        assert failure is None
    else:
        assert failure is not None
        assert failure.code == "ABORTED"
        assert f"{mortal.last_rank}: " in failure.message
        assert "commit" not in point or f"version {version + 1} was not committed" in failure.message
    result = stream.end().result
    assert result is not None, stream.error
    assert len(result.token_ids[0]) == TOKENS
    assert result.completion.weight_versions in ((version,), (version, version + 1))
    assert new or result.completion.weight_versions == (version,)
    mortal.check(old, new=new)


@pytest.mark.parametrize(("point", "new"), [("after commit", False), ("after confirm", True)])
def test_an_engine_that_is_killed_leaves_a_whole_version_that_its_successor_finds(
    mortal: Mortal, old: dict[str, torch.Tensor], point: str, new: bool
) -> None:
    """E46, U35: the old one, unless a rank may have been told to give it back."""
    mortal.prepare(f"engine {point}", "self")
    failure = update(mortal)
    assert failure is not None
    assert failure.code == "UNAVAILABLE"
    mortal.check(old, new=new)


@pytest.mark.parametrize(("point", "new"), [("before commit", False), ("before confirm", None)])
def test_a_rank_and_the_engine_that_are_killed_together_leave_a_whole_version(
    mortal: Mortal, old: dict[str, torch.Tensor], point: str, new: bool | None
) -> None:
    """E46, U35: whether the other ranks have taken their step by then or not."""
    mortal.prepare(f"{mortal.last_rank} {point}", mortal.engine, "self")
    assert update(mortal) is not None
    mortal.check(old, new=new)

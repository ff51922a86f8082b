"""Registrations: who belongs to the gang, and when it is whole."""

from __future__ import annotations

import asyncio

import pytest

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.members import Members, RegistrationError


def registration(
    pod: str, ranks: dict[int, int], *, attempt: int = 1, rendezvous: str = ""
) -> worker_pb2.RegisterRequest:
    return worker_pb2.RegisterRequest(
        pod_uid=pod,
        address="10.0.0.1",
        attempt=attempt,
        ranks=[worker_pb2.RankAddress(rank=rank, pid=1, port=port) for rank, port in ranks.items()],
        rendezvous=rendezvous,
    )


def test_gang_is_complete_once_every_rank_and_the_store_are_there() -> None:
    """W18."""
    members = Members(3, attempt=1)
    assert members.missing == ["rank 0", "rank 1", "rank 2", "the rendezvous store"]
    members.register(registration("a", {0: 10, 2: 12}))
    incomplete = members.complete
    assert incomplete is None
    members.register(registration("b", {1: 11}))
    assert members.missing == ["the rendezvous store"]
    members.register(registration("a", {0: 10, 2: 12}, rendezvous="10.0.0.1:99"))
    complete = members.complete
    assert complete is not None
    assert [endpoint.target for endpoint in complete.ranks] == ["10.0.0.1:10", "10.0.0.1:11", "10.0.0.1:12"]
    assert [endpoint.pod for endpoint in complete.ranks] == ["a", "b", "a"]
    assert complete.rendezvous == "10.0.0.1:99"


def test_same_registration_again_changes_nothing() -> None:
    """W18."""
    members = Members(1, attempt=1)
    assert members.register(registration("a", {0: 10}))
    version = members.version
    assert not members.register(registration("a", {0: 10}))
    assert members.version == version


def test_rank_that_is_gone_is_missing_again() -> None:
    """W19."""
    members = Members(2, attempt=1)
    members.register(registration("a", {0: 10, 1: 11}, rendezvous="x:1"))
    members.register(registration("a", {0: 10}, rendezvous="x:1"))
    assert members.missing == ["rank 1"]


def test_new_pod_takes_the_ranks_of_the_one_it_replaces() -> None:
    members = Members(2, attempt=1)
    members.register(registration("a", {0: 10}, rendezvous="x:1"))
    members.register(registration("b", {1: 11}))
    members.register(registration("c", {1: 21}))
    complete = members.complete
    assert complete is not None
    assert (complete.ranks[1].pod, complete.ranks[1].port) == ("c", 21)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (registration("a", {0: 10}, attempt=2), "this engine is of attempt 1, the pod is of attempt 2"),
        (registration("a", {5: 10}), "rank 5 is outside a world of 2"),
    ],
)
def test_what_can_not_belong_to_the_gang_is_refused(request_: worker_pb2.RegisterRequest, reason: str) -> None:
    members = Members(2, attempt=1)
    with pytest.raises(RegistrationError, match=reason):
        members.register(request_)
    assert members.endpoints == {}


def test_rank_named_twice_is_refused() -> None:
    request = registration("a", {0: 10})
    request.ranks.add(rank=0, pid=2, port=11)
    with pytest.raises(RegistrationError, match="twice"):
        Members(2, attempt=1).register(request)


async def test_change_wakes_who_waits_for_it() -> None:
    members = Members(1, attempt=1)
    waiting = asyncio.create_task(members.changed(members.version, 5.0))
    await asyncio.sleep(0)
    members.register(registration("a", {0: 10}))
    assert await waiting
    assert not await members.changed(members.version, 0.01)


def test_a_rank_that_is_lost_is_missing_until_its_pod_presents_another_process() -> None:
    """W19, W25: news of a process that was replaced before changes nothing."""
    members = Members(2, attempt=1)
    members.register(registration("a", {0: 10, 1: 11}, rendezvous="10.0.0.1:99"))
    version = members.version
    assert not members.lost(1, 999)
    assert members.version == version
    pid = members.endpoints[1].pid
    assert members.lost(1, pid)
    assert members.complete is None
    assert members.missing == ["rank 1"]
    assert not members.lost(1, pid)
    assert members.register(registration("a", {0: 10, 1: 12}, rendezvous="10.0.0.1:99"))
    assert members.complete is not None

"""How a worker pod finds its leader by name."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from tpmodel_worker.supervisor.leader_lookup import NamedLeader, family_of, resolve_name


class Names:
    """A name service for one name."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked = 0

    def resolve(self, host: str, family: socket.AddressFamily) -> list[str]:
        assert (host, family) == ("leader", socket.AF_INET)
        self.asked += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return list(self.addresses)


def leader(names: Names) -> NamedLeader:
    return NamedLeader("leader", family=socket.AF_INET, resolve=names.resolve, search_seconds=0.01, watch_seconds=0.02)


async def test_a_name_that_does_not_exist_yet_is_asked_for_until_it_does() -> None:
    names = Names()
    finding = asyncio.create_task(leader(names).find())
    await asyncio.sleep(0.2)
    assert not finding.done()
    assert names.asked > 3
    names.addresses = ["10.0.0.1", "10.0.0.2"]
    assert await asyncio.wait_for(finding, 5) == "10.0.0.1"


async def test_a_name_with_another_address_means_that_the_leader_has_moved() -> None:
    names = Names()
    names.addresses = ["10.0.0.1"]
    moving = asyncio.create_task(leader(names).moved_from("10.0.0.1"))
    await asyncio.sleep(0.1)
    assert not moving.done()
    names.addresses = ["10.0.0.2"]
    await asyncio.wait_for(moving, 5)


async def test_a_name_without_an_address_says_nothing_about_the_leader() -> None:
    names = Names()
    moving = asyncio.create_task(leader(names).moved_from("10.0.0.1"))
    await asyncio.sleep(0.2)
    assert names.asked > 3
    assert not moving.done()
    moving.cancel()


async def test_a_name_service_that_hangs_holds_nothing_up() -> None:
    answer = threading.Event()

    def hang(_host: str, _family: socket.AddressFamily) -> list[str]:
        answer.wait(30)
        return ["10.0.0.1"]

    finding = asyncio.create_task(NamedLeader("leader", family=socket.AF_INET, resolve=hang).find())
    begun = time.monotonic()
    await asyncio.sleep(0.05)
    assert time.monotonic() - begun < 1
    finding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finding
    answer.set()


def test_the_system_is_asked_for_the_family_of_the_pod() -> None:
    assert family_of("10.0.0.1") == socket.AF_INET
    assert family_of("fd00::1") == socket.AF_INET6
    assert resolve_name("127.0.0.7", socket.AF_INET) == ["127.0.0.7"]
    with pytest.raises(OSError, match=r"family|Name|address"):
        resolve_name("127.0.0.7", socket.AF_INET6)

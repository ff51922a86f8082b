"""From a pod's IP to the interface that has it."""

from __future__ import annotations

import socket

import pytest

from tpmodel_worker.comm.interfaces import interface_of, list_addresses


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.8.7"], ids=["its own address", "one of its network"])
def test_the_loopback_interface_has_the_loopback_addresses(address: str) -> None:
    assert interface_of(address) == "lo"


def test_every_address_of_this_machine_leads_to_its_interface() -> None:
    found = list_addresses()
    assert {entry.interface for entry in found} <= {name for _, name in socket.if_nameindex()}
    for entry in found:
        assert interface_of(str(entry.network.ip)) == entry.interface


def test_an_address_of_nobody_has_no_interface() -> None:
    assert interface_of("203.0.113.77") is None

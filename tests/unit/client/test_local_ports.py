"""The ports that a local server is given."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tpmodel import local


def test_free_ports_are_none_that_the_system_gives_to_connections() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = local.free_ports(50)
    assert len(set(ports)) == 50
    assert max(ports) < first


def test_a_port_where_somebody_listens_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        (port,) = local.free_ports(1)
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(local, "_PORTS", range(port, port + 1))
        with pytest.raises(OSError, match="no 1 ports"):
            local.free_ports(1)

"""Ports are held before any process starts."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from tpmodel.local import free_ports
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.ports import PortError, reserved_ports

NAMES = ("port", "http_port", "control_port", "health_port", "metrics_port")


def settings(**ports: int) -> ServeSettings:
    anywhere = ServeSettings(model_path="m", model_id="m", served_name="m")
    return dataclasses.replace(anywhere, **(dict.fromkeys(NAMES, 0) | ports))


def listener(port: int, *, shared: bool) -> socket.socket:
    server = socket.socket()
    if shared:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def test_zero_becomes_a_port_of_its_own() -> None:
    with reserved_ports(settings()) as held:
        numbers = [getattr(held, name) for name in NAMES]
    assert all(numbers)
    assert len(set(numbers)) == 5


def test_a_given_port_is_kept() -> None:
    (port,) = free_ports(1)
    with reserved_ports(settings(port=port)) as held:
        assert held.port == port


def test_processes_that_share_the_port_listen_beside_the_reservation_and_get_all_connections() -> None:
    with reserved_ports(settings()) as held, listener(held.port, shared=True) as server:
        for _ in range(16):
            with socket.create_connection(("127.0.0.1", held.port), timeout=1):
                server.settimeout(1)
                server.accept()[0].close()


def test_nobody_else_gets_a_held_port() -> None:
    with reserved_ports(settings()) as held, pytest.raises(OSError, match="in use"):
        listener(held.port, shared=False)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_port_in_use_is_refused_naming_its_option(name: str, shared: bool) -> None:
    with listener(0, shared=shared) as other:
        port = other.getsockname()[1]
        with pytest.raises(PortError, match=f"^--{name.replace('_', '-')} {port} is in use: "):
            reserved_ports(settings(**{name: port})).__enter__()


def test_one_number_for_two_ports_is_refused() -> None:
    (port,) = free_ports(1)
    with pytest.raises(PortError, match=f"--port and --http-port are both {port}"):
        reserved_ports(settings(port=port, http_port=port)).__enter__()


def test_a_host_that_no_name_service_knows_is_named() -> None:
    with pytest.raises(PortError, match=r"--host 'nowhere\.invalid' can't be listened on"):
        reserved_ports(dataclasses.replace(settings(), host="nowhere.invalid")).__enter__()


def test_a_host_that_is_not_here_is_named() -> None:
    elsewhere = ServeSettings(model_path="m", model_id="m", served_name="m", host="203.0.113.1", port=9)
    with pytest.raises(PortError, match=r"203\.0\.113\.1 is no address of this machine"):
        reserved_ports(elsewhere).__enter__()


def test_ports_are_free_again_afterwards() -> None:
    with reserved_ports(settings()) as held:
        pass
    listener(held.port, shared=False).close()


def test_an_ipv6_address_is_bracketed() -> None:
    assert join_host_port("::1", 9000) == "[::1]:9000"
    assert join_host_port("127.0.0.1", 9000) == "127.0.0.1:9000"

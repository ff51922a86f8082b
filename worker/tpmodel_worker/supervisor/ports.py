"""Reserves the pod's ports before any process starts."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import socket
from collections.abc import Iterator

from tpmodel_worker.settings import ServeSettings

# Setting, option and whether it listens where clients come in (host) or inside the gang (address).
_EVERY_POD = (
    ("health_port", "--health-port", True),
    ("metrics_port", "--metrics-port", True),
)
_LEADER_POD = (
    ("port", "--port", True),
    ("http_port", "--http-port", True),
    ("control_port", "--control-port", False),
    *_EVERY_POD,
)


class PortError(Exception):
    """A port cannot be had; the message names the option."""


@contextlib.contextmanager
def reserved_ports(settings: ServeSettings) -> Iterator[ServeSettings]:
    """Holds the ports and yields the settings with concrete numbers in the place of 0.

    A held socket is bound with SO_REUSEPORT and never listens, so that processes of the same user bind the port
    beside it, get all of its connections, and nobody else takes it while one of them restarts.

    Raises:
        PortError: a port is in use, or not to be had on this machine.
    """
    with contextlib.ExitStack() as held:
        numbers: dict[str, int] = {}
        ports = _LEADER_POD if settings.leads else _EVERY_POD
        # Those that may be any come last, since one that is asked for by number must not be taken by them.
        for name, option, faces_clients in sorted(ports, key=lambda port: getattr(settings, port[0]) == 0):
            host = settings.host if faces_clients else settings.address
            port = getattr(settings, name)
            for other_name, other_option, _ in ports:
                if port and numbers.get(other_name) == port:
                    raise PortError(f"{other_option} and {option} are both {port}: give each a port of its own")
            reservation = _reserve(host, port, option)
            held.enter_context(reservation)
            numbers[name] = reservation.getsockname()[1]
        yield dataclasses.replace(settings, **numbers)


def _reserve(host: str, port: int, option: str) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if port:
            # Without SO_REUSEPORT first: with it, another server of this user would go unnoticed.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        reservation = socket.socket(family, socket.SOCK_STREAM)
        try:
            # After the bind where any port will do: the kernel would count those of this user's that have it as free.
            if port:
                reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reservation.bind(address)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            reservation.close()
            raise
    except OSError as error:
        raise PortError(_explain(error, host, port, option)) from error
    return reservation


def _explain(error: OSError, host: str, port: int, option: str) -> str:
    if isinstance(error, socket.gaierror):
        return f"--host {host!r} can't be listened on: {error.strerror}"
    reasons = {
        errno.EADDRINUSE: "is in use: give another one, or 0 for any that is free",
        errno.EACCES: "needs more privileges",
        errno.EADDRNOTAVAIL: f"cannot be bound: {host} is no address of this machine",
    }
    reason = reasons.get(error.errno or 0, f"cannot be bound: {os.strerror(error.errno or 0)}")
    return f"{option} {port} {reason}"

"""Where the control ports of a model's gangs are: as they were given, or as a name says at the moment."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tpmodel.trainer.errors import WeightUpdateError

_DNS = "dns:///"


class Targets:
    """Addresses of control ports, looked up anew at each look."""

    def __init__(self, given: str | Sequence[str]) -> None:
        """given: `host:port`, several of them, or `dns:///host:port` for all addresses that the name has.

        Raises:
            ValueError: one of them is no such thing.
        """
        self._given = [given] if isinstance(given, str) else list(given)
        if not self._given:
            raise ValueError("there is no gang to connect to")
        for target in self._given:
            _parts(target)

    @property
    def changing(self) -> bool:
        """Whether gangs may come and go: some are known by a name only."""
        return any(target.startswith(_DNS) for target in self._given)

    def now(self) -> list[str]:
        """`host:port` of every gang, always in the same order. Raises WeightUpdateError where a name has no address."""
        found: list[str] = []
        for target in self._given:
            found += _addresses(target) if target.startswith(_DNS) else [target]
        return list(dict.fromkeys(found))


def _addresses(target: str) -> list[str]:
    host, port = _parts(target)
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise WeightUpdateError("UNAVAILABLE", f"{target}: no gang is found under this name: {error}") from error
    addresses = sorted({str(address[0]) for *_, address in answers})
    return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]


def _parts(target: str) -> tuple[str, int]:
    host, _, port = target.removeprefix(_DNS).rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError(f"{target!r} is no control port: write host:port, or {_DNS}host:port for all gangs of a model")
    return host.removeprefix("[").removesuffix("]"), int(port)

"""How addresses are written."""

from __future__ import annotations


def join_host_port(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_host_port(text: str) -> tuple[str, int]:
    """What join_host_port has joined. Raises ValueError where it is no such thing."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text}: HOST:PORT is needed")
    return host.removeprefix("[").removesuffix("]"), int(port)

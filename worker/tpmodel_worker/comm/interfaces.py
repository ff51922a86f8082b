"""Which network interface has an address: NCCL is told interfaces by name, the pod knows its IP."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass


class _Address(ctypes.Structure):
    """struct ifaddrs of the C library, as far as it is read here."""


_Address._fields_ = [
    ("next", ctypes.POINTER(_Address)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
]


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """One address of one interface."""

    interface: str
    network: ipaddress.IPv4Interface | ipaddress.IPv6Interface


def list_addresses() -> list[InterfaceAddress]:
    """The IP addresses of this network namespace. Raises OSError when the kernel does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Address)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"getifaddrs: {os.strerror(number)}")
    try:
        return list(_walk(first))
    finally:
        libc.freeifaddrs(first)


def interface_of(address: str) -> str | None:
    """The interface that has the address, or whose network it belongs to (all of 127.0.0.0/8 is lo's)."""
    wanted = ipaddress.ip_address(address)
    found = list_addresses()
    exact = [entry.interface for entry in found if entry.network.ip == wanted]
    near = [entry.interface for entry in found if wanted in entry.network.network]
    return next(iter([*exact, *near]), None)


def _walk(entry: ctypes._Pointer[_Address]) -> Iterator[InterfaceAddress]:
    while entry:
        each = entry.contents
        address, netmask = _read(each.address), _read(each.netmask)
        if address is not None and netmask is not None:
            prefix = int(netmask).bit_count()
            yield InterfaceAddress(each.name.decode(), ipaddress.ip_interface(f"{address}/{prefix}"))
        entry = each.next


def _read(location: int | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP of a struct sockaddr; None for other kinds of address."""
    if not location:
        return None
    (family,) = struct.unpack("=H", ctypes.string_at(location, 2))
    # Behind the family come the port and, for IPv6, the flow label.
    if family == socket.AF_INET:
        return ipaddress.IPv4Address(ctypes.string_at(location + 4, 4))
    if family == socket.AF_INET6:
        return ipaddress.IPv6Address(ctypes.string_at(location + 8, 16))
    return None

"""The cluster's network: a switch in a namespace of its own, one link to this machine, one to each node.

This machine gets one interface and some routes, no packet filter rule and no bridge. Nodes route to each other's
pods over the switch; from here pods are reached through their node and service addresses through the first node.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from . import addresses
from .errors import ClusterError
from .namespaces import Namespaces
from .processes import Daemon, run

HOST_INTERFACE = "tpmodel-test0"
BRIDGE = "switch"


@dataclass(kw_only=True)
class Network:
    """The switch and its links; `folder` holds what is needed to find it again."""

    folder: Path
    switch: Namespaces = field(init=False)

    def __post_init__(self) -> None:
        self.switch = Namespaces(holder=Daemon(name="switch", folder=self.folder), kinds=("net",))

    def create(self, nodes: int) -> None:
        """The switch, this machine's link to it, and routes to all nodes' pods."""
        if self.switch.is_furnished() and left():
            return
        self.remove()
        self.switch.create()
        switch = self.switch.first_process()
        self._inside("link", "add", BRIDGE, "type", "bridge")
        self._inside("link", "set", BRIDGE, "up")
        _ip("link", "add", HOST_INTERFACE, "type", "veth", "peer", "name", "host", "netns", str(switch))
        self._inside("link", "set", "host", "master", BRIDGE, "up")
        _ip("address", "add", f"{addresses.HOST}/{addresses.PREFIX}", "dev", HOST_INTERFACE)
        _ip("link", "set", HOST_INTERFACE, "up")
        for number in range(1, nodes + 1):
            _ip("route", "replace", addresses.pod_subnet(number), "via", addresses.node_address(number))
        _ip("route", "replace", addresses.SERVICE_RANGE, "via", addresses.node_address(1))
        self.switch.furnished()

    def attach(self, node: Namespaces, number: int, nodes: int) -> None:
        """Links a node to the switch and gives it its address and routes."""
        link = _link(number)
        with contextlib.suppress(ClusterError):
            self._inside("link", "delete", link)
        self._inside("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(node.first_process()))
        self._inside("link", "set", link, "master", BRIDGE, "up")
        commands = [
            f"address add {addresses.node_address(number)}/{addresses.PREFIX} dev eth0",
            "link set lo up",
            "link set eth0 up",
            # No way out: what a pod sends elsewhere is refused at once instead of lost.
            f"route add {addresses.SERVICE_RANGE} dev eth0",
        ]
        commands += [
            f"route add {addresses.pod_subnet(other)} via {addresses.node_address(other)}"
            for other in range(1, nodes + 1)
            if other != number
        ]
        for command in commands:
            node.run(["ip", *command.split()], only=["net"])
        node.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], only=["net"])

    def set_link(self, number: int, *, up: bool) -> None:
        """Cuts a node's link, or mends it."""
        self._inside("link", "set", _link(number), "up" if up else "down")

    def remove(self) -> None:
        """Everything; this machine's routes go with its interface."""
        with contextlib.suppress(ClusterError):
            _ip("link", "delete", HOST_INTERFACE)
        self.switch.destroy()

    def _inside(self, *arguments: str) -> None:
        self.switch.run(["ip", *arguments])


def left() -> bool:
    """Whether this machine's interface is still there; none was ever made where there is no `ip`."""
    return shutil.which("ip") is not None and HOST_INTERFACE in run(["ip", "-brief", "link"])


def _link(number: int) -> str:
    return f"node{number}"


def _ip(*arguments: str) -> None:
    run(["ip", *arguments])

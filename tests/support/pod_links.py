"""Pods of a gang in network namespaces of their own, joined by a bridge, with links that can be cut and delayed.

Needs root.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Iterator, Sequence

from support.slow_link import SlowLink


class PodLinks:
    """A network of this test alone: the test itself is its address 1, pod N is address N + 2."""

    def __init__(self, pods: int, *, slow: Sequence[int] = ()) -> None:
        """slow: the pods whose links can be delayed."""
        self._name = f"tl{random.randrange(16**6):06x}"
        self._subnet = f"10.{random.randint(200, 250)}.{random.randint(0, 250)}"
        _ip("link", "add", self._name, "type", "bridge")
        _ip("address", "add", f"{self._subnet}.1/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        self._slow: dict[int, SlowLink] = {}
        for index in range(pods):
            namespace, link = self._namespace(index), self._link(index)
            _ip("netns", "add", namespace)
            if index in slow:
                self._slow[index] = SlowLink(link, f"{link}i")
                _ip("link", "set", f"{link}i", "netns", namespace, "name", "eth0")
            else:
                _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", link, "master", self._name, "up")
            _ip("-n", namespace, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", "eth0", "up")
        self._pods = pods

    def address(self, index: int) -> str:
        """A pod's IP."""
        return f"{self._subnet}.{index + 2}"

    def prefix(self, index: int) -> Sequence[str]:
        """What runs a command inside a pod's namespace."""
        return ("ip", "netns", "exec", self._namespace(index))

    def cut(self, index: int) -> None:
        """From now on every packet from and to a pod is lost, and nobody is told."""
        _ip("link", "set", self._link(index), "down")

    def mend(self, index: int) -> None:
        """The link works again."""
        _ip("link", "set", self._link(index), "up")

    @contextlib.contextmanager
    def delayed(self, index: int, seconds: float) -> Iterator[None]:
        """While the block runs every packet from and to a pod takes so long; the pod is one of the slow ones."""
        self._slow[index].delay = seconds
        try:
            yield
        finally:
            self._slow[index].delay = 0.0

    @contextlib.contextmanager
    def interrupted(self, index: int, seconds: float) -> Iterator[None]:
        """Cuts a pod's link, runs the block, and mends the link when it has been cut for so long."""
        self.cut(index)
        begun = time.monotonic()
        try:
            yield
            time.sleep(max(0.0, begun + seconds - time.monotonic()))
        finally:
            self.mend(index)

    def close(self) -> None:
        """Removes everything."""
        for link in self._slow.values():
            link.close()
        for index in range(self._pods):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", self._namespace(index))
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", self._name)

    def _namespace(self, index: int) -> str:
        return f"{self._name}-{index}"

    def _link(self, index: int) -> str:
        return f"{self._name}p{index}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)

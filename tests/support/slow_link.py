"""A link that delays every packet: two TAP devices and a thread between them. Needs root; the kernel may lack netem."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_LONGEST_FRAME = 65_536
_IDLE_SECONDS = 0.2


def _open_tap(name: str) -> int:
    """Makes a TAP device of that name, which lives as long as the descriptor."""
    descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return descriptor


class SlowLink:
    """Carries frames between two new devices, in order, each as late as the delay says when it comes."""

    def __init__(self, left: str, right: str) -> None:
        """left, right: names of the devices, at most 15 characters; they may be moved into network namespaces."""
        self.delay = 0.0
        """Seconds, one way."""
        self.frames = 0
        """Carried so far."""
        self._ends = (_open_tap(left), _open_tap(right))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, name=f"link {left}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and removes both devices."""
        self._stop.set()
        self._thread.join(10)
        for end in self._ends:
            os.close(end)

    def _carry(self) -> None:
        left, right = self._ends
        other = {left: right, right: left}
        under_way: deque[tuple[float, int, bytes]] = deque()
        while not self._stop.is_set():
            wait = max(0.0, min(_IDLE_SECONDS, under_way[0][0] - time.monotonic())) if under_way else _IDLE_SECONDS
            for end in select.select(self._ends, (), (), wait)[0]:
                due = max(time.monotonic() + self.delay, under_way[-1][0] if under_way else 0.0)
                try:
                    under_way.append((due, other[end], os.read(end, _LONGEST_FRAME)))
                except OSError:
                    continue  # the device is down, or there was nothing after all
            now = time.monotonic()
            while under_way and under_way[0][0] <= now:
                _, end, frame = under_way.popleft()
                try:
                    os.write(end, frame)
                    self.frames += 1
                except OSError:
                    continue  # as on a wire that leads nowhere

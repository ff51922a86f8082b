"""The operator, killing itself (SIGKILL) at a given write of a coordinated restart.

Run as a script with the operator's arguments. TPMODEL_TEST_DIE_AT is the number of the write, counted from 1 after
the first status that says so; TPMODEL_TEST_DIE_AFTER=1: after the API server has answered it, else before it is sent.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tpmodel_operator.kube import Kube
from tpmodel_operator.main import main

WRITES = ("POST", "PATCH", "PUT", "DELETE")


class DyingKube:
    """Counts the writes of the first restart."""

    def __init__(self) -> None:
        self.number = int(os.environ["TPMODEL_TEST_DIE_AT"])
        self.after = os.environ.get("TPMODEL_TEST_DIE_AFTER") == "1"
        self.made = 0

    def install(self) -> None:
        """From now on every Kube counts."""
        send = Kube._send

        @asynccontextmanager
        async def counted(
            kube: Kube, method: str, path: str, *, body: Any = None, **more: Any
        ) -> AsyncIterator[aiohttp.ClientResponse]:
            number = self._count(method, path, body)
            if number == self.number and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            async with send(kube, method, path, body=body, **more) as response:
                if number == self.number:
                    await response.read()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield response

        Kube._send = counted  # type: ignore[method-assign, assignment]

    def _count(self, method: str, path: str, body: Any) -> int:
        """The number of the write, 0 for all that do not count."""
        if method not in WRITES or "/leases" in path or "/events" in path:
            return 0
        restarting = path.endswith("/status") and any(gang.get("restart") for gang in body["status"]["gangs"])
        if self.made or restarting:
            self.made += 1
        return self.made


if __name__ == "__main__":
    DyingKube().install()
    main()

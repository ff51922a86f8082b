"""Rank and rendezvous processes as new interpreters, which import everything themselves: slow, and holding nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from tpmodel.v1 import pod_pb2
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.processes import Process, ProcessStartError, ProcessTable


class ColdStarts:
    """Starts every process by executing cold_start."""

    def __init__(
        self,
        table: ProcessTable,
        settings: ServeSettings,
        *,
        entries: Mapping[str, str],
        environment: Mapping[str, str],
    ) -> None:
        """entries: "module:function" by role. environment: of all that it starts."""
        self._table = table
        self._settings = settings
        self._entries = dict(entries)
        self._environment = dict(environment)

    async def new_process(self, role: str, name: str, *, rank: int = 0) -> Process:
        """Starts a process; see ProcessSource.new_process."""
        request = pod_pb2.ForkRequest(role=role, rank=rank, settings_json=self._settings.to_json())
        try:
            # The settings hold the gang's token: no argument and no variable may carry them.
            descriptor = os.memfd_create("request")
            try:
                os.pwrite(descriptor, request.SerializeToString(), 0)
                return await self._table.execute(
                    name,
                    [
                        sys.executable,
                        "-m",
                        "tpmodel_worker.supervisor.cold_start",
                        f"--supervisor={os.getpid()}",
                        f"--request-fd={descriptor}",
                        f"--entry={self._entries[role]}",
                    ],
                    environment=self._environment,
                    pass_fds=[descriptor],
                    shim=False,
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ProcessStartError(f"{name}: no new process: {error}") from error

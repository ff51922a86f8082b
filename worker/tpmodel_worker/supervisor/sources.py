"""Where a pod's rank and rendezvous processes come from: a fork server, or a new interpreter each."""

from __future__ import annotations

from typing import Protocol

from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor import linux
from tpmodel_worker.supervisor.cold_starts import ColdStarts
from tpmodel_worker.supervisor.entries import EntryPoints
from tpmodel_worker.supervisor.fork_client import ForkServer
from tpmodel_worker.supervisor.processes import Process, ProcessTable

# The most that glibc accepts, and how much it may keep of what was freed.
_MALLOC_MMAP_BYTES = 32 * 1024 * 1024
_MALLOC_KEPT_BYTES = 512 * 1024 * 1024


class ProcessSource(Protocol):
    """Makes processes that run one of the pod's entries."""

    async def new_process(self, role: str, name: str, *, rank: int = 0) -> Process:
        """Starts a process.

        Args:
            role: which entry it runs.
            name: what it is called in output and status.
            rank: for ranks, which one.

        Raises:
            ProcessStartError: there is none.
        """
        ...


def make_source(table: ProcessTable, settings: ServeSettings, entries: EntryPoints) -> ForkServer | ColdStarts:
    """The source that settings.respawn asks for; a ForkServer must be kept alive."""
    by_role = {"rank": entries.rank, "spare": entries.spare, "rendezvous": entries.rendezvous}
    environment = _compute_environment(settings)
    if settings.respawn == "cold":
        return ColdStarts(table, settings, entries=by_role, environment=environment)
    return ForkServer(table, settings, entries=by_role, preload=entries.preload, environment=environment)


def _compute_environment(settings: ServeSettings) -> dict[str, str]:
    """Variables that must be set before torch is imported."""
    threads = str(max(1, linux.available_cores() // len(settings.ranks_here)))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # numpy's own; its threads would start at import, before the fork.
        "OPENBLAS_NUM_THREADS": "1",
        # Activations of some MiB come and go in every layer. By default glibc gives each back to the kernel and
        # gets it again page by page: a decode step of 16 sequences then took three times as long.
        "MALLOC_MMAP_THRESHOLD_": str(_MALLOC_MMAP_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_MALLOC_KEPT_BYTES),
    }

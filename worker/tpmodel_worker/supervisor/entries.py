"""Which programs and functions the pod's processes run."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPoints:
    """The real ones, unless a test stands in for some."""

    engine: tuple[str, ...] = (sys.executable, "-m", "tpmodel_worker.engine")
    """Command; `--settings-file FILE` is appended."""
    api: tuple[str, ...] = (sys.executable, "-m", "tpmodel_worker.api")
    """Command; `--settings-file FILE --index I` is appended."""
    rank: str = "tpmodel_worker.rank.main:run_rank"
    """module:function, called with the settings and the rank in a forked process."""
    spare: str = "tpmodel_worker.rank.spare:run_spare"
    """module:function, called with the settings in a forked process that may become a rank."""
    rendezvous: str = "tpmodel_worker.comm.rendezvous:run_rendezvous"
    """module:function, called with the settings in a forked process."""
    preload: tuple[str, ...] = ("torch", "triton?", "tpmodel_worker.rank.spare", "tpmodel_worker.comm.rendezvous")
    """What the fork server imports; "?" marks what may be absent."""

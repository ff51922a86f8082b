"""Which programs and functions the pod's processes run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_FORKED = MappingProxyType(
    {
        "rank": "tpmodel_worker.rank.main:run_rank",
        "rendezvous": "tpmodel_worker.comm.rendezvous:run_rendezvous",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPoints:
    """The real ones, unless a test stands in for some."""

    engine: tuple[str, ...] = (sys.executable, "-m", "tpmodel_worker.engine")
    """Command; `--settings-file FILE` is appended."""
    api: tuple[str, ...] = (sys.executable, "-m", "tpmodel_worker.api")
    """Command; `--settings-file FILE --index I` is appended."""
    forked: Mapping[str, str] = _FORKED
    """module:function by role; called with the settings and, for ranks, the rank."""
    preload: tuple[str, ...] = ("torch", "triton?", "triton.language?")
    """What the fork server imports; "?" marks what may be absent."""

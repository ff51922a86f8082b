"""What a supervisor tells whoever started it, as it happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.lifecycle import Ending


@dataclass(frozen=True, slots=True)
class Output:
    """A process of the pod printed a line."""

    process: str
    line: str


@dataclass(frozen=True, slots=True)
class EngineStateChanged:
    """The engine reported its state."""

    state: worker_pb2.EngineState


@dataclass(frozen=True, slots=True)
class Ready:
    """The world serves and every api process listens, for the first time."""

    settings: ServeSettings
    """With concrete ports."""
    seconds: float
    """Since the supervisor started."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker pod was registered with its leader, for the first time."""

    settings: ServeSettings
    leader: str
    """The leader pod's IP."""
    seconds: float
    """Since the supervisor started."""


@dataclass(frozen=True, slots=True)
class Downloading:
    """The checkpoint is being fetched."""

    download: worker_pb2.Download


@dataclass(frozen=True, slots=True)
class Draining:
    """Running streams are being finished, then the gang ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Every process is gone."""

    ending: Ending


SupervisorEvent = Output | EngineStateChanged | Ready | Joined | Downloading | Draining | Ended
EventListener = Callable[[SupervisorEvent], None]

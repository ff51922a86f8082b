"""What can go wrong between the engine and its ranks, with everybody's account of it kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2

CLOSED_BEFORE_REPLY = "session closed before reply"
_PREFIX = "ERROR_KIND_"


class SessionClosedError(Exception):
    """A message was to be sent on a session that has ended."""


class ProtocolError(Exception):
    """A rank answered with something that the protocol does not allow."""


class WrongRankError(Exception):
    """The process at a rank's address says that it is another rank."""


class SanityCheckError(Exception):
    """An all-reduce of ones did not give the world size on every rank."""


class ChecksumError(Exception):
    """Two ranks have computed different tokens."""


class StepDeadlineError(Exception):
    """Ranks have not finished a plan in the time that it may take."""


class StaleAttemptError(Exception):
    """The gang is at a higher attempt than this engine."""


class RebuildRefusedError(Exception):
    """No other world can follow now."""


class NewerGenerationError(Exception):
    """Somebody asks for the next world while this one is well."""


class PodPartedError(NewerGenerationError):
    """A pod that drains has been let go: the next world is that of its successor."""


class RendezvousMovedError(Exception):
    """The ranks were to meet at a store that is gone; there is another one."""


class ConfigurationError(Exception):
    """What was asked for can't work, however often it is tried: a person has to change something."""


def kind_name(kind: worker_pb2.ErrorKind.ValueType) -> str:
    """The kind of a rank's error as it is written in messages: out_of_memory."""
    return worker_pb2.ErrorKind.Name(kind).removeprefix(_PREFIX).lower()


@dataclass(frozen=True, slots=True)
class RankFailure:
    """One rank's part of a failure."""

    rank: int
    message: str
    kind: worker_pb2.ErrorKind.ValueType | None = None
    """What the rank itself called it; None where the rank gave no answer at all."""
    closed: bool = False
    """The session to the rank has ended."""
    exited: bool = False
    """Its supervisor says that the process has ended."""

    def __str__(self) -> str:
        if self.kind is None:
            return f"rank {self.rank}: {self.message}"
        return f"rank {self.rank}: {kind_name(self.kind)}: {self.message}"


def closed_before_reply(rank: int, detail: str) -> RankFailure:
    """The failure of a rank whose session ended while an answer was due."""
    message = f"{CLOSED_BEFORE_REPLY} ({detail})" if detail else CLOSED_BEFORE_REPLY
    return RankFailure(rank, message, closed=True)


class PoolError(Exception):
    """A request to the ranks failed: the engine's own failure first, then each rank's, by rank."""

    def __init__(self, what: str, *, engine: Exception | None = None, ranks: Iterable[RankFailure] = ()) -> None:
        """what: the request that failed, or what happened to the world."""
        self.what = what
        self.engine = engine
        self.ranks = tuple(sorted(ranks, key=lambda failure: failure.rank))
        super().__init__(what, engine, self.ranks)

    def __str__(self) -> str:
        parts = [f"engine: {self.engine}"] if self.engine is not None else []
        parts += [str(failure) for failure in self.ranks]
        return f"{self.what}: {'; '.join(parts)}" if parts else self.what

    @property
    def kinds(self) -> frozenset[worker_pb2.ErrorKind.ValueType]:
        """The kinds of error that ranks reported."""
        return frozenset(failure.kind for failure in self.ranks if failure.kind is not None)

    def with_ranks(self, failures: Iterable[RankFailure]) -> PoolError:
        """The same failure with more ranks' accounts; a rank's first account stays."""
        known = {failure.rank for failure in self.ranks}
        added = [failure for failure in failures if failure.rank not in known]
        return PoolError(self.what, engine=self.engine, ranks=[*self.ranks, *added]) if added else self

    def with_exit(self, failure: RankFailure) -> PoolError:
        """The same failure with what became of a rank's process, unless the rank itself gave an account."""
        others = [known for known in self.ranks if known.rank != failure.rank]
        spoke = any(known.rank == failure.rank and known.kind is not None for known in self.ranks)
        return self if spoke else PoolError(self.what, engine=self.engine, ranks=[*others, failure])

    @property
    def fault_kind(self) -> str:
        """One word for metrics and fault lists: what went wrong first."""
        if self.engine is not None and (name := _FAULT_KINDS.get(type(self.engine))):
            return name
        if fatal := self.kinds & FATAL_KINDS:
            return kind_name(min(fatal))
        if any(failure.exited for failure in self.ranks):
            return "rank_exited"
        if any(failure.closed for failure in self.ranks):
            return "session_closed"
        # Ranks that were aborted since another one failed say nothing about the cause.
        reported = [
            kind for failure in self.ranks if (kind := failure.kind) not in (None, worker_pb2.ERROR_KIND_ABORTED)
        ]
        return kind_name(reported[0]) if reported else "internal"


FATAL_KINDS = frozenset({worker_pb2.ERROR_KIND_DEVICE_POISONED})
"""Errors after which a rank's process is of no more use."""

_FAULT_KINDS: dict[type[Exception], str] = {
    ChecksumError: "checksum",
    NewerGenerationError: "newer_generation",
    PodPartedError: "pod_drained",
    RendezvousMovedError: "rendezvous_moved",
    ProtocolError: "protocol",
    SanityCheckError: "sanity_check",
    StaleAttemptError: "stale_attempt",
    StepDeadlineError: "step_deadline",
    TimeoutError: "deadline",
    WrongRankError: "wrong_rank",
}

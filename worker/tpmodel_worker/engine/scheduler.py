"""The scheduler: turns requests into plans and rank 0's replies into outputs. Pure: no I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.requests import (
    Admitted,
    InvalidRequestError,
    NeverFitsError,
    ProtocolError,
    QueueFullError,
    RefusedError,
    Request,
    RequestTooLongError,
    SchedulerConfig,
    SequenceOutput,
)

__all__ = [
    "Admitted",
    "InvalidRequestError",
    "NeverFitsError",
    "ProtocolError",
    "QueueFullError",
    "RefusedError",
    "Request",
    "RequestTooLongError",
    "Scheduler",
    "SchedulerConfig",
    "SequenceOutput",
]


class Scheduler:
    """Decides what every rank computes next.

    The engine calls `next_plan` whenever fewer than two plans are outstanding, sends what it returns to
    every rank, and hands rank 0's replies to `commit`, in order. Outputs come back from `commit`,
    `expire`, `fail_all` and `take_outputs`, each of which also returns what planning or submitting left
    (admissions, failures): call `take_outputs` after `submit` and `next_plan`.
    """

    def __init__(self, config: SchedulerConfig, *, clock: Callable[[], float], weight_version: int) -> None: ...

    def submit(self, request: Request) -> None:
        """Takes a request. Raises RefusedError (its `code` is the google.rpc.Code)."""

    def cancel(self, key: Hashable, sample_index: int | None = None) -> bool:
        """Ends a request, or one sample of it (absolute index), without output. False: it was not live."""
        raise NotImplementedError

    def next_plan(self, seq: int) -> worker_pb2.GenerateStepRequest | None:
        """The next plan, which must be sent as `seq`; None while nothing can run.

        A plan that only releases slots has steps = 0 and ack_now: rank 0's answer goes to commit too.
        """
        raise NotImplementedError

    def commit(self, seq: int, reply: worker_pb2.GenerateStepOk) -> list[SequenceOutput]:
        """Takes rank 0's reply for one step; the last step's (or a steps = 0 plan's only one) ends the plan.

        Raises ProtocolError when the reply does not fit the plan: a fault of the world.
        """
        raise NotImplementedError

    def take_outputs(self) -> list[SequenceOutput]:
        """Outputs that submit and next_plan left: admissions, failures, resumed streams that were at their end."""
        raise NotImplementedError

    def expire(self, now: float | None = None) -> list[SequenceOutput]:
        """Fails every request whose deadline has passed with DEADLINE_EXCEEDED. now: unix seconds, else the clock's."""
        raise NotImplementedError

    def fail_all(self, code: int, message: str) -> list[SequenceOutput]:
        """Fails every live request."""
        raise NotImplementedError

    def rebuild(self, config: SchedulerConfig) -> None:
        """A new epoch: outstanding plans are forgotten, KV and prefix cache empty, running sequences wait again."""

    @property
    def running(self) -> int:
        """Requests of which a sample holds a slot."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """Live requests of which no sample holds a slot."""
        raise NotImplementedError

    @property
    def slots_used(self) -> int:
        """Sequences that hold a slot."""
        raise NotImplementedError

    @property
    def blocks_used(self) -> int:
        """Blocks that running sequences hold (cached ones that nobody holds count as free)."""
        raise NotImplementedError

    @property
    def blocks_total(self) -> int:
        """Blocks of the KV cache."""
        raise NotImplementedError

    @property
    def outstanding_plans(self) -> int:
        """Plans made whose last reply has not come."""
        raise NotImplementedError

    @property
    def prefix_queries(self) -> int:
        """Tokens of admitted requests that were looked up in the prefix cache."""
        raise NotImplementedError

    @property
    def prefix_hits(self) -> int:
        """Of these, tokens found there."""
        raise NotImplementedError

    @property
    def next_deadline(self) -> float | None:
        """Unix seconds of the earliest deadline of a live request (or earlier); None: there is none."""
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a release is still to be sent; next_plan may yet be waiting for replies."""
        raise NotImplementedError

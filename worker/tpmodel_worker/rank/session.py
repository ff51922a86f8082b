"""The protocol state of a rank: which epoch may run, what a session may send, when ranks other than 0 answer.

Pure: no gRPC, no torch, no clock of its own.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from tpmodel.v1 import worker_pb2 as pb

ACK_MAX_PLANS = 16
"""Plans that a rank other than 0 may leave unanswered."""
ACK_MAX_SECONDS = 0.05
"""How long a rank other than 0 may leave a plan that is done unanswered."""

_PLAN = "generate_step"


class EpochEndedError(Exception):
    """The epoch was ended (Abort, a newer session, a broken session) while or before it was at work."""


class OpenVerdict(enum.Enum):
    """What becomes of a session that wants to open."""

    ACCEPTED = enum.auto()
    DUPLICATE = enum.auto()
    """There was a session of this epoch already."""
    STALE = enum.auto()
    """The epoch is older than the newest one, or was ended."""


class EpochGate:
    """The newest epoch with a session, and how far epochs have ended. Thread-safe.

    The computing thread attaches how to release it from the epoch's collectives; whoever ends the
    epoch calls that, from another thread.
    """

    def __init__(self, floor: int = 0) -> None:
        """floor: this epoch and all older ones are refused from the start: they belong to lower attempts."""
        self._lock = threading.Lock()
        self._current = 0
        self._ended = floor
        self._release: Callable[[str], None] | None = None

    @property
    def current(self) -> int:
        """The epoch of the newest session; 0 before the first."""
        return self._current

    @property
    def ended(self) -> int:
        """This epoch and all older ones have ended."""
        return self._ended

    @property
    def newest(self) -> int:
        """The highest epoch seen in any way."""
        return max(self._current, self._ended)

    def open(self, epoch: int) -> OpenVerdict:
        """Makes the epoch the current one if it is newer than every epoch seen, and ends the older ones."""
        with self._lock:
            if epoch <= self._ended or epoch < self._current:
                return OpenVerdict.STALE
            if epoch == self._current:
                return OpenVerdict.DUPLICATE
            release, self._release = self._release, None
            self._current = epoch
            self._ended = max(self._ended, epoch - 1)
        if release is not None:
            release(f"epoch {epoch} begins")
        return OpenVerdict.ACCEPTED

    def end(self, epoch: int, reason: str) -> None:
        """Ends the epoch and all older ones; releases the computing thread if it is in one of them."""
        with self._lock:
            self._ended = max(self._ended, epoch)
            if self._current > epoch:
                return
            release, self._release = self._release, None
        if release is not None:
            release(reason)

    def attach(self, epoch: int, release: Callable[[str], None]) -> None:
        """From now on `release(reason)` gets the computing thread out of the epoch's collectives.

        Raises:
            EpochEndedError: too late; nothing was attached.
        """
        with self._lock:
            if epoch <= self._ended:
                raise EpochEndedError(f"epoch {epoch} has ended")
            self._release = release

    def check(self, epoch: int) -> None:
        """Raises EpochEndedError once the epoch has ended."""
        if epoch <= self._ended:
            raise EpochEndedError(f"epoch {epoch} has ended")


class SessionProtocol:
    """What one session has asked and what was answered. Used by the I/O thread only.

    seq counts from 1 without gaps; one control request is outstanding at a time, and only while every
    plan is settled; a control request gets exactly one final reply.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.last_seq = 0
        self._control: int | None = None
        self._plans: dict[int, int] = {}

    @property
    def idle(self) -> bool:
        """Nothing is outstanding."""
        return self._control is None and not self._plans

    def receive(self, request: pb.SessionRequest) -> pb.SessionResponse | None:
        """Takes a request in. None: it is to be executed. Otherwise its refusal; the session lives on."""
        if request.epoch != self.epoch:
            kind = pb.ERROR_KIND_STALE_EPOCH if request.epoch < self.epoch else pb.ERROR_KIND_OUT_OF_ORDER
            return _refusal(request, kind, f"the message is of epoch {request.epoch}, the session of {self.epoch}")
        if request.seq != self.last_seq + 1:
            return _refusal(
                request, pb.ERROR_KIND_OUT_OF_ORDER, f"seq {request.seq} does not follow seq {self.last_seq}"
            )
        self.last_seq = request.seq
        name = request.WhichOneof("request")
        if name is None:
            return _refusal(request, pb.ERROR_KIND_UNKNOWN_OP, "the request is not one that this rank knows")
        if self._control is not None:
            message = f"control request {self._control} is still outstanding"
            return _refusal(request, pb.ERROR_KIND_OUT_OF_ORDER, message)
        if name == _PLAN:
            self._plans[request.seq] = max(request.generate_step.steps, 1) - 1
            return None
        if self._plans:
            message = f"plans {min(self._plans)} to {max(self._plans)} are not settled: settle them before {name}"
            return _refusal(request, pb.ERROR_KIND_OUT_OF_ORDER, message)
        self._control = request.seq
        return None

    def reply(self, response: pb.SessionResponse) -> bool:
        """Notes a reply that is about to go out; False: it answers nothing outstanding and must not go out."""
        if response.epoch != self.epoch:
            return False
        if response.seq == self._control:
            if response.WhichOneof("response") != "progress":
                self._control = None
            return True
        if response.seq not in self._plans:
            return False
        if response.HasField("error"):
            del self._plans[response.seq]
        elif response.generate_step_ok.step >= self._plans[response.seq]:
            for seq in [seq for seq in self._plans if seq <= response.seq]:
                del self._plans[seq]
        return True


class AckPolicy:
    """When a rank other than 0 answers: at least every 16 plans, or 50 ms after a plan that is done."""

    def __init__(self, *, max_plans: int = ACK_MAX_PLANS, max_seconds: float = ACK_MAX_SECONDS) -> None:
        self._max_plans = max_plans
        self._max_seconds = max_seconds
        self._waiting = 0
        self._since = 0.0

    def done(self, now: float, *, ack_now: bool) -> bool:
        """A plan was done at `now` (seconds, monotonic): whether the cumulative reply goes out at once."""
        if self._waiting == 0:
            self._since = now
        self._waiting += 1
        if ack_now or self._waiting >= self._max_plans or now - self._since >= self._max_seconds:
            self._waiting = 0
            return True
        return False

    def remaining(self, now: float) -> float | None:
        """Seconds until a reply is due without another plan; None: nothing waits."""
        return max(0.0, self._since + self._max_seconds - now) if self._waiting else None

    def flush(self) -> None:
        """The cumulative reply goes out now."""
        self._waiting = 0


def _refusal(request: pb.SessionRequest, kind: pb.ErrorKind.ValueType, message: str) -> pb.SessionResponse:
    return pb.SessionResponse(epoch=request.epoch, seq=request.seq, error=pb.Error(kind=kind, message=message))

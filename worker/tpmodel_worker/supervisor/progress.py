"""Notices that nothing goes on any more. Decisions only: no I/O, the clock is passed in.

Each supervisor judges what it can see for itself. A pod that was never heard of counts for nothing: its container may
not run yet, for want of a node or an image, and to restart the gang for that would help nobody; the operator sees it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field

from tpmodel.v1 import worker_pb2
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.supervisor.lifecycle import SERVED, Ending


@dataclass(slots=True)
class Stopwatch:
    """How long something has stayed as it is."""

    _last: Hashable = None
    _since: float = 0.0

    def observe(self, seen: Hashable, now: float) -> float:
        """Seconds since `seen` was last different; None never ages."""
        if seen is None or seen != self._last:
            self._last, self._since = seen, now
        return now - self._since


@dataclass(slots=True)
class WorldWatch:
    """The leader pod's: a world that does not serve yet makes progress, or waits for a pod that has not come."""

    deadline_seconds: float
    own_ranks: Collection[int]
    _stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _ranks_seen: set[int] = field(default_factory=set)

    def observe(self, state: worker_pb2.EngineState | None, now: float) -> Ending | None:
        """Looks at the engine's state (None: none came yet) at the time `now`."""
        phase = state.phase if state is not None else worker_pb2.PHASE_UNSPECIFIED
        ranks, done, total = (state.ready_ranks, state.load_done_bytes, state.load_total_bytes) if state else (0, 0, 0)
        judged = phase not in SERVED and phase != worker_pb2.PHASE_FAILED and not self._waits_for_a_pod(state)
        waited = self._stopwatch.observe((phase, ranks, done) if judged else None, now)
        if waited < self.deadline_seconds:
            return None
        seen = f"{done} of {total} bytes loaded, {ranks} ranks ready"
        return Ending(ExitCode.RESTART_GANG, f"no progress for {self.deadline_seconds:.0f} s: {seen}")

    def _waits_for_a_pod(self, state: worker_pb2.EngineState | None) -> bool:
        """Whether this pod's ranks are there, and another pod's have never been."""
        if state is None or state.phase != worker_pb2.PHASE_FORMING:
            return False
        self._ranks_seen |= {rank.rank for rank in state.ranks if rank.state != "missing"}
        everybody = set(range(state.world_size))
        return self._ranks_seen != everybody and self._ranks_seen.issuperset(self.own_ranks)


@dataclass(slots=True)
class PodWatch:
    """A worker pod's: its ranks come up, and a leader that it once had comes back."""

    deadline_seconds: float
    leader_host: str
    attempt: int
    _stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _had_leader: bool = False

    def observe(self, ranks_up: int, ranks: int, registered: bool, now: float) -> Ending | None:
        """ranks_up: how many of the pod's ranks serve. registered: whether the engine knows the pod."""
        self._had_leader |= registered
        if ranks_up < ranks:
            seen: Hashable = ranks_up
            what = f"only {ranks_up} of this pod's {ranks} ranks have come up"
        else:
            # A leader that never was may still be waiting for its node or its image.
            seen = "no leader" if self._had_leader and not registered else None
            what = f"the leader of attempt {self.attempt} at {self.leader_host} is gone"
        if self._stopwatch.observe(seen, now) < self.deadline_seconds:
            return None
        return Ending(ExitCode.RESTART_GANG, f"no progress for {self.deadline_seconds:.0f} s: {what}")


@dataclass(slots=True)
class RebuildPatience:
    """Whether a leader pod counts as serving: also for a while without a world, since most rebuilds take seconds."""

    seconds: float = 10.0
    _since: float | None = None

    def observe(self, state: worker_pb2.EngineState | None, now: float) -> bool:
        """Looks at the engine's state (None: there is no engine) at the time `now`."""
        if state is None or state.phase != worker_pb2.PHASE_REBUILDING:
            self._since = None
            return state is not None and state.phase == worker_pb2.PHASE_SERVING
        if self._since is None:
            self._since = now
        return now - self._since < self.seconds

    def left(self, now: float) -> float | None:
        """Seconds after which another look is due; None: time alone changes nothing."""
        over = self._since is None or now - self._since >= self.seconds
        return None if over or self._since is None else self._since + self.seconds - now

"""What the end of a process, or of all progress, means for the pod. Decisions only: no I/O, the clock is passed in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tpmodel.v1 import worker_pb2
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.logs import message_of
from tpmodel_worker.supervisor.processes import ProcessExit

DRAINS = frozenset({worker_pb2.PHASE_DRAINING, worker_pb2.PHASE_DRAINED})
"""The gang takes leave."""
SERVED = DRAINS | {worker_pb2.PHASE_SERVING, worker_pb2.PHASE_REBUILDING}
"""A world has been built."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the pod ends, and the code that its main process ends with."""

    code: ExitCode
    cause: str


@dataclass(slots=True)
class RestartPolicy:
    """Restarts with growing pauses; gives up on what ends too often."""

    limit: int = 5
    """Ends within the window that are one too many."""
    window_seconds: float = 60.0
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 5.0
    _ends: deque[float] = field(default_factory=deque)

    def pause(self, now: float) -> float:
        """Notes an end at the time `now`; how many seconds to wait before the restart."""
        self._ends.append(now)
        while self._ends[0] <= now - self.window_seconds:
            self._ends.popleft()
        return min(self.longest_pause_seconds, self.first_pause_seconds * 2 ** (len(self._ends) - 1))

    @property
    def exhausted(self) -> bool:
        """Whether the last noted end was one too many."""
        return len(self._ends) >= self.limit


def judge_member(ended: ProcessExit, phase: worker_pb2.Phase.ValueType, *, rebuilds: bool = False) -> Ending | None:
    """Whether the end of a rank or of the engine ends the pod: it does once a world has served.

    Before, the process is replaced and the world waits for it; unless it says that no retry helps. At the end of a
    drain all of them leave, with code 0.

    Args:
        ended: how it ended.
        phase: the engine's last phase before it failed, if it did.
        rebuilds: a world that served is rebuilt, so that a process is replaced then, too.
    """
    if (refused := judge_refusal(ended)) is not None:
        return refused
    if rebuilds:
        return None
    if phase in DRAINS and ended.code == ExitCode.DRAINED:
        return None
    if phase in SERVED:
        state = worker_pb2.Phase.Name(phase).removeprefix("PHASE_").lower()
        return Ending(ExitCode.RESTART_GANG, f"{ended.describe()} while the world was {state}")
    return None


def judge_refusal(ended: ProcessExit) -> Ending | None:
    """Whether a process ended because no retry helps; the last line that it printed says why."""
    if ended.code != ExitCode.CONFIGURATION:
        return None
    why = message_of(ended.last_stderr_lines[-1]) if ended.last_stderr_lines else "its configuration cannot work"
    return Ending(ExitCode.CONFIGURATION, f"{ended.name}: {why}")


def judge_repeated(ended: ProcessExit, policy: RestartPolicy) -> Ending | None:
    """Whether a process has ended once too often."""
    if not policy.exhausted:
        return None
    times = f"{policy.limit} times within {policy.window_seconds:.0f} s"
    return Ending(ExitCode.RESTART_GANG, f"{ended.name} ended {times}; the last time: {ended.describe()}")


def judge_state(state: worker_pb2.EngineState) -> Ending | None:
    """Whether the engine's own account ends the pod: it has failed."""
    if state.phase != worker_pb2.PHASE_FAILED:
        return None
    code = ExitCode.CONFIGURATION if state.exit_code == ExitCode.CONFIGURATION else ExitCode.RESTART_GANG
    return Ending(code, state.cause or "the engine failed without naming a cause")

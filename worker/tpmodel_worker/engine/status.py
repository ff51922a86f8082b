"""The engine's account of itself, and who is told when it changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from tpmodel.v1 import worker_pb2

COUNTER_SECONDS = 0.1
"""Changes of counters are told at most this often."""
MAX_FAULTS = 16
MAX_REBUILDS = 8
WEIGHTS_UPDATING = "WeightsUpdating"
WEIGHTS_INCOMPLETE = "WeightsIncomplete"
WEIGHTS_LOST = "WeightsLost"
WEIGHTS_LOADING = "Loading"
_MAX_CAUSE = 2000
_FAILED = frozenset({worker_pb2.PHASE_FAILED})
_DRAINS = frozenset({worker_pb2.PHASE_DRAINING, worker_pb2.PHASE_DRAINED})
# Which phases are not left for another one.
_ENDS = dict.fromkeys((worker_pb2.PHASE_REBUILDING, worker_pb2.PHASE_SERVING), _FAILED | _DRAINS)

Listener = Callable[[worker_pb2.EngineState], None]


class EngineStatus:
    """Holds the EngineState and tells listeners: changes at once, counters every 100 ms."""

    def __init__(self, instance_id: str, world_size: int, model_id: str, max_model_len: int) -> None:
        self._state = worker_pb2.EngineState(
            instance_id=instance_id,
            phase=worker_pb2.PHASE_FORMING,
            world_size=world_size,
            model_id=model_id,
            max_model_len=max_model_len,
            ranks=[worker_pb2.RankState(rank=rank, state="missing") for rank in range(world_size)],
        )
        self._listeners: list[Listener] = []
        self._timer: asyncio.TimerHandle | None = None
        self.newest_version = 0
        """Of the weights, among all that the gang has ever committed: a new one has to be above it."""
        self.has_loaded = False
        """Whether ranks have told this engine what they have."""

    @property
    def state(self) -> worker_pb2.EngineState:
        """The live state: read it, change it only through the methods."""
        return self._state

    @property
    def phase(self) -> worker_pb2.Phase.ValueType:
        """Where the world is in its life."""
        return self._state.phase

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tells the listener the present state and every change; returns what ends that."""
        self._listeners.append(listener)
        listener(self._state)
        return lambda: self._listeners.remove(listener)

    def set_phase(self, phase: worker_pb2.Phase.ValueType, *, exit_code: int = 0, cause: str = "") -> None:
        """Enters a phase; exit_code belongs to PHASE_FAILED, cause to it, to the drain and to a rebuild.

        A failed world stays so, and one that drains goes on to do so while it is rebuilt.
        """
        if self._state.phase in _ENDS.get(phase, _FAILED):
            return
        self._state.phase = phase
        self._state.exit_code = exit_code
        self._state.cause = cause[:_MAX_CAUSE]
        self._tell()

    def set_leaving(self, cause: str) -> None:
        """The gang still takes requests, but will drain."""
        self._state.leaving = True
        self._state.cause = cause[:_MAX_CAUSE]
        self._tell()

    def set_parting(self, pod: str, uid: str = "") -> None:
        """A pod that drains, by name: the gang is not ready until its successor is there; empty: nobody drains."""
        self._state.parting_pod = pod
        # A container that was started again in the same pod drains once more.
        self._state.parted_pods[:] = [parted for parted in self._state.parted_pods if parted != uid]
        self._tell()

    def add_parted(self, uid: str) -> None:
        """A pod that may end."""
        self._state.parted_pods.append(uid)
        self._tell()

    def set_world(self, *, epoch: int | None = None, block_size: int = 0, kv_blocks: int = 0) -> None:
        """What the present world is made of."""
        if epoch is not None:
            self._state.epoch = epoch
        if kv_blocks:
            self._state.block_size = block_size
            self._state.kv_blocks_total = kv_blocks
        self._tell()

    def set_members(self, members: Iterable[worker_pb2.RankState]) -> None:
        """The ranks that are registered; all others are missing. States of unchanged ranks stay."""
        present = {member.rank: member for member in members}
        for known in self._state.ranks:
            member = present.get(known.rank)
            if member is None:
                known.CopyFrom(worker_pb2.RankState(rank=known.rank, state="missing"))
            elif (known.pid, known.pod) != (member.pid, member.pod) or known.state == "missing":
                known.CopyFrom(member)
        self._count_ready()
        self._tell()

    def set_rank_states(self, state: str, communicators: Iterable[str] = ()) -> None:
        """Puts every registered rank in a state; communicators: by rank, where they are known now."""
        names = list(communicators)
        for member in self._state.ranks:
            if member.state != "missing":
                member.state = state
                if names:
                    member.communicator = names[member.rank]
        self._count_ready()
        self._tell()

    def set_device(self, rank: int, device: str) -> None:
        """The device that a rank says it has."""
        self._state.ranks[rank].device = device

    def set_progress(self, rank: int, percent: float, done_bytes: int, total_bytes: int) -> None:
        """How far a rank's load is, and all ranks' together in bytes."""
        self._state.ranks[rank].load_percent = percent
        self._state.load_done_bytes = done_bytes
        self._state.load_total_bytes = total_bytes
        self._state.load_percent = 100.0 * done_bytes / total_bytes if total_bytes else 0.0
        self._tell_soon()

    def set_weight_version(self, version: int) -> None:
        """The version of the weights being served."""
        self._state.weight_version = version
        self.newest_version = max(self.newest_version, version)
        self._tell()

    def set_persisted(self, version: int | None, error: str) -> None:
        """What every rank has in its file (None: as before), and why that is not the version being served."""
        if version is not None:
            self._state.persisted_version = version
        self._state.persist_error = error[:_MAX_CAUSE]
        self._tell()

    @property
    def weights_condition(self) -> str:
        """What keeps the weights from being served; empty: nothing."""
        return self._state.weights_condition

    def set_weights_condition(self, condition: str, message: str = "") -> None:
        """Says why the gang is not ready because of its weights; empty: it is."""
        self._state.weights_condition = condition
        self._state.weights_message = message[:_MAX_CAUSE]
        self._tell()

    def set_loaded_versions(self, versions: Sequence[int | None], committed: int = 0) -> None:
        """What every rank of a new world has loaded; None: an update was broken off there.

        committed: the version that the gang is known to have had. Ranks with an older one have lost it.
        """
        self.has_loaded = True
        known = max(self._state.weight_version, committed)
        self.newest_version = max(self.newest_version, known, *(version or 0 for version in versions))
        condition = message = ""
        if None in versions:
            ranks = ", ".join(str(rank) for rank, version in enumerate(versions) if version is None)
            condition = WEIGHTS_INCOMPLETE
            message = f"an update did not finish: the weights of rank {ranks} are incomplete; send a full set"
        elif len(set(versions)) > 1 or (versions[0] or 0) < known:
            condition = WEIGHTS_LOST
            newest = max(known, *(version or 0 for version in versions))
            message = f"version {newest} is lost, the ranks have {', '.join(map(str, versions))}; send a full set"
        elif versions[0] is not None:
            self._state.weight_version = versions[0]
        self.set_weights_condition(condition, message)

    def set_counters(self, *, running: int, waiting: int, kv_blocks_used: int) -> None:
        """What the scheduler has in hand."""
        state = self._state
        if (state.running, state.waiting, state.kv_blocks_used) != (running, waiting, kv_blocks_used):
            state.running, state.waiting, state.kv_blocks_used = running, waiting, kv_blocks_used
            self._tell_soon()

    def add_fault(self, kind: str, message: str, *, detection_seconds: float = 0.0) -> None:
        """Remembers a fault; the last 16 are kept. detection_seconds: since the last sign of life."""
        fault = worker_pb2.Fault(
            unix_seconds=time.time(),
            epoch=self._state.epoch,
            kind=kind,
            message=message[:_MAX_CAUSE],
            detection_seconds=detection_seconds,
        )
        self._state.last_faults.append(fault)
        del self._state.last_faults[:-MAX_FAULTS]
        self._tell()

    def count_rebuild(self, left: int) -> None:
        """A rebuild has begun; so many more are allowed."""
        self._state.rebuilds += 1
        self._state.rebuilds_left = left
        self._tell()

    def set_rebuilds_left(self, left: int) -> None:
        """How many rebuilds are allowed."""
        self._state.rebuilds_left = left
        self._tell_soon()

    def add_rebuild(self, rebuild: worker_pb2.Rebuild) -> None:
        """Remembers a rebuild that led to a world; the last 8 are kept."""
        self._state.last_rebuilds.append(rebuild)
        del self._state.last_rebuilds[:-MAX_REBUILDS]
        self._tell()

    def _count_ready(self) -> None:
        self._state.ready_ranks = sum(member.state == "ready" for member in self._state.ranks)

    def _tell_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(COUNTER_SECONDS, self._tell)

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for listener in list(self._listeners):
            listener(self._state)

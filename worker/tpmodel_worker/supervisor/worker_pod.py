"""A worker pod: ranks only. Its supervisor finds the leader pod, and lives as the gang does."""

from __future__ import annotations

import asyncio
import logging
import time

from tpmodel.v1 import worker_pb2
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.entries import EntryPoints
from tpmodel_worker.supervisor.events import EventListener, Joined
from tpmodel_worker.supervisor.leader_lookup import NamedLeader, family_of
from tpmodel_worker.supervisor.lifecycle import DRAINS, Ending, judge_member
from tpmodel_worker.supervisor.pod import Pod
from tpmodel_worker.supervisor.processes import ProcessExit
from tpmodel_worker.supervisor.progress import PodWatch
from tpmodel_worker.supervisor.status import HealthPort

_log = logging.getLogger(__name__)

# The leader cuts what is not finished in time; its goodbyes come a little later.
_DRAIN_MARGIN_SECONDS = 10.0
_GRACE_SECONDS = 2.0


class WorkerPod(Pod):
    """A pod of a gang that is not its leader's."""

    def __init__(
        self, settings: ServeSettings, entries: EntryPoints, on_event: EventListener, health: HealthPort
    ) -> None:
        leader = NamedLeader(settings.leader_host, family=family_of(settings.address))
        super().__init__(settings, entries, on_event, health, leader)
        self._progress = PodWatch(settings.progress_deadline, settings.leader_host, settings.attempt)
        self._had_leader = False
        self._alone = asyncio.Event()
        """Set while the pod is not registered."""
        self._alone.set()

    def status(self) -> worker_pb2.GangStatusResponse:
        """The engine's state while the pod is registered with it; otherwise the gang is forming."""
        status = super().status()
        if not self._registration.registered:
            lost = f"the leader at {self._settings.leader_host} is gone" if self._had_leader else ""
            status.engine.CopyFrom(
                worker_pb2.EngineState(
                    phase=worker_pb2.PHASE_FORMING,
                    world_size=self._settings.world_size,
                    model_id=self._settings.model_id,
                    cause=lost,
                )
            )
        return status

    def _judge_forked(self, rank: int, ended: ProcessExit) -> Ending | None:
        if ended.code == ExitCode.DRAINED:
            # It got the engine's Bye. Outside of a drain that means that the engine is ending: the rank is started
            # again, and waits for the leader's successor as the pod does.
            return None
        phase = self._state.phase if self._state is not None else worker_pb2.PHASE_UNSPECIFIED
        return judge_member(ended, phase, rebuilds=self._settings.rebuilds)

    def _judge_progress(self, now: float) -> Ending | None:
        ranks = self._settings.ranks_here
        return self._progress.observe(self._forked.serving, len(ranks), self._registration.registered, now)

    def _on_followed_state(self, state: worker_pb2.EngineState) -> None:
        self._state = state
        if (state.leaving or state.phase in DRAINS) and self._ends_with_the_gang:
            self._forked.stop_restarting()
        self._changed.set()

    def _look(self) -> bool:
        registered = self._registration.registered
        if registered:
            self._alone.clear()
        else:
            self._alone.set()
        if registered and not self._had_leader:
            self._had_leader = True
            seconds = time.monotonic() - self._started
            self._on_event(Joined(self._settings, self._registration.leader_address, seconds))
        self._end_with_the_gang()
        return registered

    @property
    def _ends_with_the_gang(self) -> bool:
        """Mode InPlace: only a pod that drains itself; else it waits, with its weights, for the leader's successor."""
        return self.draining or not self._settings.rebuilds

    def _end_with_the_gang(self) -> None:
        """The gang drains, whoever asked for it: this pod ends when its ranks got their Bye, or with the world."""
        state = self._state
        if state is None or not self._ends_with_the_gang:
            return
        if self.draining and self._settings.pod_uid in state.parted_pods:
            self._end(Ending(ExitCode.DRAINED, f"drained: {self._drain_reason}"))
        if state.phase not in DRAINS:
            return
        processes = self._forked.processes
        said_bye = bool(processes) and not any(process.alive for process in processes)
        if state.phase == worker_pb2.PHASE_DRAINED or said_bye:
            cause = state.cause or self._drain_reason or "the leader pod drains"
            self._end(Ending(ExitCode.DRAINED, f"drained: {cause}"))

    async def _drain(self) -> None:
        """Tells the leader, and changes nothing else: this pod serves until the gang has drained or let it go."""
        if await self._registration.drain():
            try:
                async with asyncio.timeout(self._settings.drain_timeout + _DRAIN_MARGIN_SECONDS):
                    await self._alone.wait()
            except TimeoutError:
                _log.warning("the gang has not drained in time")
        # Without a leader there are no requests that this pod could help to finish.
        self._end(Ending(ExitCode.DRAINED, f"drained: {self._drain_reason}"))

    async def _end_processes(self, ending: Ending) -> None:
        # By Bye if at all: ranks ignore SIGTERM.
        grace = _GRACE_SECONDS if self._state is not None and self._state.phase in DRAINS else 0.0
        await self._table.end(self._forked.processes, grace)

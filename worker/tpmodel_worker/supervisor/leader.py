"""The leader pod: the engine and the api processes beside the gang's first ranks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.entries import EntryPoints
from tpmodel_worker.supervisor.events import EngineStateChanged, EventListener, Ready
from tpmodel_worker.supervisor.executed import Keeper
from tpmodel_worker.supervisor.leader_lookup import KnownLeader
from tpmodel_worker.supervisor.lifecycle import DRAINS, SERVED, Ending, judge_member, judge_refusal, judge_state
from tpmodel_worker.supervisor.pod import Pod, Server
from tpmodel_worker.supervisor.processes import Process, ProcessExit
from tpmodel_worker.supervisor.progress import RebuildPatience, WorldWatch
from tpmodel_worker.supervisor.report import ENGINE, ReportServer
from tpmodel_worker.supervisor.runtime import write_settings_file
from tpmodel_worker.supervisor.status import HealthPort

_log = logging.getLogger(__name__)

# After the engine's own account of a fault, the kernel's of a dead process may still follow, and names the cause.
_BETTER_CAUSE_SECONDS = 0.2
_LAST_REPORT_SECONDS = 1.0
_DRAIN_MARGIN_SECONDS = 5.0
# How long each group may take to end by itself, in the order of its ending.
_API_GRACE_SECONDS = 3.0
_ENGINE_GRACE_SECONDS = 5.0
_OTHERS_GRACE_SECONDS = 2.0


class LeaderPod(Pod):
    """Pod 0 of a gang; in `tpmodel serve` the only one."""

    def __init__(
        self, settings: ServeSettings, entries: EntryPoints, on_event: EventListener, health: HealthPort
    ) -> None:
        super().__init__(settings, entries, on_event, health, KnownLeader(settings.address))
        self._settings_file: Path | None = None
        self._phase: worker_pb2.Phase.ValueType = worker_pb2.PHASE_UNSPECIFIED  # the last one before it failed
        self._drained = asyncio.Event()
        self._was_ready = False
        self._patience = RebuildPatience()
        self._progress = WorldWatch(settings.progress_deadline, settings.ranks_here)
        self._report = ReportServer(settings.report_socket, on_state=self._on_state, on_change=self._changed.set)
        self._api_names = [f"api {index}" for index in range(settings.api_processes)]
        self._engine_keeper = Keeper(self._start_engine, judge=self._judge_engine, end_pod=self._end)
        self._api_keepers = [
            Keeper(
                lambda index=index: self._start_api(index),
                judge=_judge_api,
                end_pod=self._end,
                gives_up=lambda: not self._was_ready,
            )
            for index in range(settings.api_processes)
        ]

    async def run(self) -> Ending:
        """As every pod, with the settings written down for engine and api processes."""
        self._settings_file = write_settings_file(self._settings)
        return await super().run()

    def _servers(self) -> Sequence[Server]:
        return [self._report, *super()._servers()]

    def _tasks(self) -> Iterator[Coroutine[Any, Any, None]]:
        yield from super()._tasks()
        yield self._engine_keeper.keep()
        for keeper in self._api_keepers:
            yield keeper.keep()

    async def _end_processes(self, ending: Ending) -> None:
        """Clients first, then the engine, which takes leave of the ranks, then the ranks and what is left.

        Ranks end by the engine's Bye, never by SIGTERM, so that after a failure there is nothing to wait for.
        """
        api = [process for process in self._table.processes if process.name in self._api_names]
        await self._table.end(api, _API_GRACE_SECONDS)
        engine = [process for process in self._table.processes if process.name == ENGINE]
        await self._table.end(engine, _ENGINE_GRACE_SECONDS)
        others_grace = _OTHERS_GRACE_SECONDS if ending.code is ExitCode.DRAINED else 0.0
        await self._table.end(self._table.processes, others_grace)

    # ------------------------------------------------------------------------------------- processes

    async def _start_engine(self) -> Process:
        command = [*self._entries.engine, "--settings-file", str(self._settings_file)]
        return await self._table.execute(ENGINE, command, environment=self._metrics_environment)

    async def _start_api(self, index: int) -> Process:
        command = [*self._entries.api, "--settings-file", str(self._settings_file), "--index", str(index)]
        return await self._table.execute(self._api_names[index], command, environment=self._metrics_environment)

    @property
    def _metrics_environment(self) -> dict[str, str]:
        # Read by prometheus_client when it is imported.
        return {"PROMETHEUS_MULTIPROC_DIR": str(self._settings.metrics_dir)}

    async def _judge_engine(self, ended: ProcessExit) -> Ending | None:
        await self._report.engine_gone(_LAST_REPORT_SECONDS)
        ending = judge_state(self._state) if self._state is not None else None
        ending = ending or judge_member(ended, self._phase, rebuilds=self._settings.rebuilds and not self.draining)
        if ending is None and self._phase in SERVED:
            self._engine_keeper.forget()  # its successor takes a rebuild from the budget
        self._state, self._phase = None, worker_pb2.PHASE_UNSPECIFIED
        self._drained.set()  # there is nothing left to finish
        return ending

    def _judge_forked(self, rank: int, ended: ProcessExit) -> Ending | None:
        if rank == RENDEZVOUS_RANK:
            return None
        return judge_member(ended, self._phase, rebuilds=self._settings.rebuilds)

    def _on_process(self, process: Process) -> None:
        if not process.alive and process.name in (ENGINE, *self._api_names):
            mark_process_dead(process.pid, str(self._settings.metrics_dir))
        super()._on_process(process)

    # -------------------------------------------------------------------------------- state of the world

    def _on_state(self, state: worker_pb2.EngineState) -> None:
        self._state = state
        self._on_event(EngineStateChanged(state))
        ending = judge_state(state)
        if ending is None:
            self._phase = state.phase
        elif self._was_ready:
            asyncio.get_running_loop().call_later(_BETTER_CAUSE_SECONDS, self._end, ending)
        else:
            self._end(ending)
        if state.phase == worker_pb2.PHASE_DRAINED:
            self._drained.set()
        if (state.leaving or state.phase in DRAINS) and not self.draining:
            # Another pod of the gang got SIGTERM. The engine has no world any more after this drain, so this pod
            # ends with it: with 0, though nobody asked for its own end.
            self.drain(state.cause or "the engine drains")

    def _on_followed_state(self, state: worker_pb2.EngineState) -> None:
        """Nothing: what the engine says over the pod's own socket came before."""

    def _judge_progress(self, now: float) -> Ending | None:
        return self._progress.observe(self._state, now)

    def _look(self) -> bool:
        self._mark_running()
        serving = self._patience.observe(self._state, time.monotonic())
        serving &= self._state is not None and not (self._state.weights_condition or self._state.parting_pod)
        if (left := self._patience.left(time.monotonic())) is not None:
            asyncio.get_running_loop().call_later(left, self._changed.set)
        ready = serving and not self.draining and self._report.listening.issuperset(self._api_names)
        if ready and not self._was_ready:
            self._was_ready = True
            self._on_event(Ready(self._settings, time.monotonic() - self._started))
        return ready

    def _mark_running(self) -> None:
        for process in self._table.processes:
            if process.name == ENGINE and self._state is not None:
                self._table.mark_running(process, self._settings.control_port)
            elif process.name in self._report.listening:
                self._table.mark_running(process, self._settings.port)

    # -------------------------------------------------------------------------------------------- drain

    async def _drain(self) -> None:
        """Lets the engine finish what runs, then ends the pod with 0.

        Where the pod itself is not being deleted (another one was), its kubelet starts the container again, at the
        same attempt. That is right, and confuses nobody. Every pod of the gang has ended or lost its ranks, so a
        restart of the whole gang is due in mode Restart whichever end the operator sees first: the deleted pod or
        this container; it is recorded by pod UID and restart count, so that the same end never counts twice. Until
        the operator comes round to it (it may be down) the new supervisors form a world again: an engine that is
        started twice within an attempt takes higher epochs than the ranks have seen, and fences by them. Once the
        attempt rises these pods are deleted, and if one of them meets the new gang before that, it ends as stale,
        which counts as no fault.
        """
        for keeper in (self._engine_keeper, *self._api_keepers, self._forked):
            keeper.stop_restarting()
        # Alone, a world that does not serve has nobody to tell; other pods learn from the engine that it is over.
        served = self._phase in (worker_pb2.PHASE_SERVING, worker_pb2.PHASE_REBUILDING, *DRAINS)
        if served or (self._settings.pods > 1 and self._state is not None):
            await self._drain_engine()
        self._end(Ending(ExitCode.DRAINED, f"drained: {self._drain_reason}"))

    async def _drain_engine(self) -> None:
        if self._phase != worker_pb2.PHASE_DRAINED:
            self._drained.clear()
        seconds = self._settings.drain_timeout
        drain = pod_pb2.DrainCommand(timeout_seconds=seconds)
        if not await self._report.send_to_engine(pod_pb2.EngineCommand(drain=drain)):
            _log.warning("the engine takes no commands: running requests are cut")
            return
        try:
            async with asyncio.timeout(seconds + _DRAIN_MARGIN_SECONDS):
                await self._drained.wait()
        except TimeoutError:
            _log.warning("the engine has not drained within %.0f s: running requests are cut", seconds)


async def _judge_api(ended: ProcessExit) -> Ending | None:
    return judge_refusal(ended)

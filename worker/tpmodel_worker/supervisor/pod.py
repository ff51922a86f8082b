"""One pod: its processes and servers, wired together, and the state that decides when it is ready and when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor import linux
from tpmodel_worker.supervisor.entries import EntryPoints
from tpmodel_worker.supervisor.events import Draining, EngineStateChanged, EventListener, Output, Ready
from tpmodel_worker.supervisor.executed import Keeper, keep_fork_server
from tpmodel_worker.supervisor.fork_client import ForkServer
from tpmodel_worker.supervisor.forked import ForkedProcesses
from tpmodel_worker.supervisor.lifecycle import Ending, ProgressWatch, judge_member, judge_refusal, judge_state
from tpmodel_worker.supervisor.memory import MemoryHolder
from tpmodel_worker.supervisor.metrics import MetricsServer
from tpmodel_worker.supervisor.processes import Process, ProcessExit, ProcessTable
from tpmodel_worker.supervisor.rank_link import RankLinkServer
from tpmodel_worker.supervisor.registration import Registration
from tpmodel_worker.supervisor.report import ENGINE, ReportServer
from tpmodel_worker.supervisor.service import SupervisorServer, SupervisorServicer
from tpmodel_worker.supervisor.status import HealthPort, process_statuses

_log = logging.getLogger(__name__)

_TICK_SECONDS = 0.5
# After the engine's own account of a fault, the kernel's of a dead process may still follow, and names the cause.
_BETTER_CAUSE_SECONDS = 0.2
_LAST_REPORT_SECONDS = 1.0
_DRAIN_MARGIN_SECONDS = 5.0
# How long each group may take to end by itself, in the order of its ending.
_API_GRACE_SECONDS = 3.0
_ENGINE_GRACE_SECONDS = 5.0
_OTHERS_GRACE_SECONDS = 2.0
# The most that glibc accepts, and how much it may keep of what was freed.
_MALLOC_MMAP_BYTES = 32 * 1024 * 1024
_MALLOC_KEPT_BYTES = 512 * 1024 * 1024


class Pod:
    """The leader pod of a gang that has no other."""

    def __init__(
        self, settings: ServeSettings, settings_file: Path, entries: EntryPoints, on_event: EventListener
    ) -> None:
        """settings: with concrete ports, token and runtime_dir. settings_file: where engine and api read them."""
        self._settings = settings
        self._settings_file = settings_file
        self._entries = entries
        self._on_event = on_event
        self._started = time.monotonic()
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._state: worker_pb2.EngineState | None = None
        self._phase: worker_pb2.Phase.ValueType = worker_pb2.PHASE_UNSPECIFIED  # the last one before it failed
        self._drain_reason = ""
        self._drain_asked = asyncio.Event()
        self._drained = asyncio.Event()
        self._changed = asyncio.Event()
        self._was_ready = False

        self._table = ProcessTable(lambda process, line: on_event(Output(process, line)))
        self._table.listen(self._on_process)
        self._memory = MemoryHolder()
        self._report = ReportServer(settings.report_socket, on_state=self._on_state, on_change=self._changed.set)
        self._registration = Registration(
            join_host_port(settings.address, settings.control_port), settings.token, self._register_request
        )
        self._link = RankLinkServer(
            settings.rank_socket,
            self._memory,
            instance_id=self._registration.instance_id,
            on_hello=self._on_hello,
        )
        self._fork_server = ForkServer(
            self._table,
            settings,
            entries={"rank": entries.rank, "rendezvous": entries.rendezvous},
            preload=entries.preload,
            environment=_compute_environment(settings),
        )
        self._members = [RENDEZVOUS_RANK, *range(settings.world_size)]
        self._forked = ForkedProcesses(
            self._members,
            self._table,
            self._fork_server,
            self._link,
            hello_seconds=settings.init_timeout,
            judge=self._judge_forked,
            end_pod=self._end,
            on_change=self._registration.changed,
        )
        servicer = SupervisorServicer(settings, self._forked, self._table, self._memory)
        self._service = SupervisorServer(settings, servicer)
        self._health = HealthPort(settings, self._gang_status)
        self._metrics = MetricsServer(
            settings.host, settings.metrics_port, settings.metrics_dir, lambda: self._table.processes
        )
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

    # ------------------------------------------------------------------------------------------- life

    async def run(self) -> Ending:
        """Starts everything, waits for a reason to end, and ends everything; nothing is left in any case."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._memory.close)
            stack.push_async_callback(self._table.kill_everything)
            for server in (self._report, self._link, self._service, self._health, self._metrics):
                await server.start()
                stack.push_async_callback(server.stop)
            async with asyncio.TaskGroup() as group:
                watchers = [group.create_task(life) for life in (*self._keep_alive(), *self._watch())]
                ending = await self._ending
                for watcher in watchers:
                    watcher.cancel()
            await self._health.set_ready(False)
            await self._end_processes(others_grace=_OTHERS_GRACE_SECONDS if ending.code is ExitCode.DRAINED else 0.0)
        return ending

    def drain(self, reason: str) -> None:
        """Begins to end the pod: running requests are finished first. Idempotent."""
        if not self.draining:
            self._drain_reason = reason
            self._on_event(Draining(reason))
            self._drain_asked.set()
            self._changed.set()

    @property
    def draining(self) -> bool:
        """Whether drain was called."""
        return self._drain_asked.is_set()

    def interrupt(self) -> None:
        """Ends the pod at once, cutting whatever runs."""
        self._end(Ending(ExitCode.INTERRUPTED, "interrupted: running requests were cut"))
        for process in self._table.processes:
            process.send_signal(signal.SIGKILL)

    def reap_orphans(self) -> None:
        """To be called on SIGCHLD."""
        self._table.reap_orphans()

    def _keep_alive(self) -> Iterator[Coroutine[Any, Any, None]]:
        yield keep_fork_server(self._fork_server, self._end)
        yield self._engine_keeper.keep()
        for keeper in self._api_keepers:
            yield keeper.keep()
        for member in self._members:
            yield self._forked.keep(member)

    def _watch(self) -> Iterator[Coroutine[Any, Any, None]]:
        yield self._registration.run()
        yield self._watch_progress()
        yield self._watch_readiness()
        yield self._drain_when_asked()

    def _end(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    async def _end_processes(self, *, others_grace: float) -> None:
        """Clients first, then the engine, which takes leave of the ranks, then the ranks and what is left.

        others_grace: how long ranks may take to end after the engine; they end by its Bye, never by SIGTERM, so
            that after a failure there is nothing to wait for.
        """
        api = [process for process in self._table.processes if process.name in self._api_names]
        await self._table.end(api, _API_GRACE_SECONDS)
        await self._table.end(
            [process for process in self._table.processes if process.name == ENGINE], _ENGINE_GRACE_SECONDS
        )
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
        ending = ending or judge_member(ended, self._phase)
        self._state, self._phase = None, worker_pb2.PHASE_UNSPECIFIED
        self._drained.set()  # there is nothing left to finish
        return ending

    def _judge_forked(self, rank: int, ended: ProcessExit) -> Ending | None:
        return None if rank == RENDEZVOUS_RANK else judge_member(ended, self._phase)

    def _on_process(self, process: Process) -> None:
        if not process.alive and process.name in (ENGINE, *self._api_names):
            mark_process_dead(process.pid, str(self._settings.metrics_dir))
        self._changed.set()

    # ------------------------------------------------------------------------------------ what is said

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

    def _on_hello(self, rank: int, process: Process, port: int) -> None:
        self._forked.on_hello(rank, process, port)

    def _register_request(self) -> worker_pb2.RegisterRequest | None:
        addresses, rendezvous = self._forked.addresses(), self._forked.rendezvous_port
        if addresses is None or rendezvous is None:
            return None
        return worker_pb2.RegisterRequest(
            pod_uid=self._settings.pod_uid,
            address=self._settings.address,
            attempt=self._settings.attempt,
            supervisor_port=self._service.port,
            ranks=addresses,
            rendezvous=join_host_port(self._settings.address, rendezvous),
        )

    def _gang_status(self) -> worker_pb2.GangStatusResponse:
        return worker_pb2.GangStatusResponse(
            engine=self._state,
            pod=self._settings.pod_uid,
            attempt=self._settings.attempt,
            processes=process_statuses(self._table.processes),
        )

    # ---------------------------------------------------------------------------------------- watching

    async def _watch_progress(self) -> None:
        watch = ProgressWatch(self._settings.progress_deadline)
        while True:
            ending = watch.observe(self._state, time.monotonic())
            if ending is not None:
                self._end(ending)
            await asyncio.sleep(_TICK_SECONDS)

    async def _watch_readiness(self) -> None:
        while True:
            self._changed.clear()
            self._mark_running()
            serving = self._state is not None and self._state.phase == worker_pb2.PHASE_SERVING
            ready = serving and not self.draining and self._report.listening.issuperset(self._api_names)
            if ready and not self._was_ready:
                self._was_ready = True
                self._on_event(Ready(self._settings, time.monotonic() - self._started))
            await self._health.set_ready(ready)
            await self._changed.wait()

    def _mark_running(self) -> None:
        for process in self._table.processes:
            if process.name == ENGINE and self._state is not None:
                self._table.mark_running(process, self._settings.control_port)
            elif process.name in self._report.listening:
                self._table.mark_running(process, self._settings.port)

    async def _drain_when_asked(self) -> None:
        await self._drain_asked.wait()
        for keeper in (self._engine_keeper, *self._api_keepers, self._forked):
            keeper.stop_restarting()
        if self._phase in (worker_pb2.PHASE_SERVING, worker_pb2.PHASE_REBUILDING):
            await self._drain_engine()
        self._end(Ending(ExitCode.DRAINED, f"drained after {self._drain_reason}"))

    async def _drain_engine(self) -> None:
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


def _compute_environment(settings: ServeSettings) -> dict[str, str]:
    """Variables that must be set before torch is imported."""
    threads = str(max(1, linux.available_cores() // settings.world_size))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # numpy's own; its threads would start at import, before the fork.
        "OPENBLAS_NUM_THREADS": "1",
        # Activations of some MiB come and go in every layer. By default glibc gives each back to the kernel and
        # gets it again page by page: a decode step of 16 sequences then took three times as long.
        "MALLOC_MMAP_THRESHOLD_": str(_MALLOC_MMAP_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_MALLOC_KEPT_BYTES),
    }


async def _judge_api(ended: ProcessExit) -> Ending | None:
    return judge_refusal(ended)

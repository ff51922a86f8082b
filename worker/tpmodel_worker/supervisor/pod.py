"""What every pod of a gang has: ranks, their memory, a place in the gang, and a way for all of it to end."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import signal
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Protocol

from tpmodel.v1 import worker_pb2
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.gang_files import read_model_revision
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.entries import EntryPoints
from tpmodel_worker.supervisor.events import Draining, EventListener, Output
from tpmodel_worker.supervisor.executed import keep_fork_server
from tpmodel_worker.supervisor.fork_client import ForkServer
from tpmodel_worker.supervisor.forked import ForkedProcesses
from tpmodel_worker.supervisor.hub import SCHEME
from tpmodel_worker.supervisor.leader_lookup import Leader
from tpmodel_worker.supervisor.lifecycle import SERVED, Ending, judge_refusal
from tpmodel_worker.supervisor.memory import MemoryHolder
from tpmodel_worker.supervisor.metrics import MetricsServer
from tpmodel_worker.supervisor.processes import Process, ProcessExit, ProcessTable
from tpmodel_worker.supervisor.rank_link import RankLinkServer
from tpmodel_worker.supervisor.registration import Registration
from tpmodel_worker.supervisor.service import SupervisorServer, SupervisorServicer
from tpmodel_worker.supervisor.sources import make_source
from tpmodel_worker.supervisor.spares import Spares
from tpmodel_worker.supervisor.status import HealthPort, process_statuses

_TICK_SECONDS = 0.5
_REVISION_SECONDS = 5.0


class Server(Protocol):
    """Something that listens."""

    async def start(self) -> None:
        """Listens; raises OSError when it cannot."""
        ...

    async def stop(self) -> None:
        """Ends every connection."""
        ...


class Pod(abc.ABC):
    """One pod, from the start of its processes to the end of the last; LeaderPod and WorkerPod say what differs."""

    def __init__(
        self, settings: ServeSettings, entries: EntryPoints, on_event: EventListener, health: HealthPort, leader: Leader
    ) -> None:
        """Args:
        settings: with concrete ports, token and runtime_dir.
        entries: what the processes run.
        on_event: told what happens.
        health: serves already; shows this pod from run() on.
        leader: where the engine is.
        """
        self._settings = settings
        self._entries = entries
        self._on_event = on_event
        self._health = health
        self._started = time.monotonic()
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._state: worker_pb2.EngineState | None = None
        """What the engine last said of itself."""
        self._drain_reason = ""
        self._drain_asked = asyncio.Event()
        self._changed = asyncio.Event()
        """Set whenever something may have changed that readiness depends on."""

        self._table = ProcessTable(lambda process, line: on_event(Output(process, line)))
        self._table.listen(self._on_process)
        self._memory = MemoryHolder()
        self._registration = Registration(
            leader,
            settings,
            request=self._register_request,
            on_state=self._on_followed_state,
            on_change=self._changed.set,
            end_pod=self._end,
        )
        self._link = RankLinkServer(
            settings.rank_socket,
            self._memory,
            instance_id=self._registration.instance_id,
            on_hello=self._on_hello,
            on_spare=self._on_spare,
        )
        self._source = make_source(self._table, settings, entries)
        self._spares = (
            Spares(self._table, self._source, self._link, ready_seconds=settings.init_timeout)
            if settings.respawn == "spare"
            else None
        )
        # One rendezvous store serves the gang.
        self._members = [*([RENDEZVOUS_RANK] if settings.leads else []), *settings.ranks_here]
        self._forked = ForkedProcesses(
            self._members,
            self._table,
            self._source,
            self._link,
            hello_seconds=settings.init_timeout,
            judge=self._judge_forked,
            end_pod=self._end,
            on_change=self._registration.changed,
            spares=self._spares,
            replaces_at_once=self._replaces_at_once,
        )
        servicer = SupervisorServicer(settings, self._forked, self._table, self._memory, end_pod=self._end)
        self._service = SupervisorServer(settings, servicer)
        self._metrics = MetricsServer(
            settings.host, settings.metrics_port, settings.metrics_dir, lambda: self._table.processes
        )

    # ------------------------------------------------------------------------------------- what differs

    @abc.abstractmethod
    def _judge_forked(self, rank: int, ended: ProcessExit) -> Ending | None:
        """Whether the end of a rank, or of the rendezvous, ends the pod."""

    @abc.abstractmethod
    def _judge_progress(self, now: float) -> Ending | None:
        """Whether too little goes on; asked every half second."""

    @abc.abstractmethod
    def _look(self) -> bool:
        """Takes in what has changed; whether the pod is ready."""

    @abc.abstractmethod
    async def _drain(self) -> None:
        """What SIGTERM means for the gang; afterwards the pod has an ending."""

    @abc.abstractmethod
    async def _end_processes(self, ending: Ending) -> None:
        """Ends all processes, in the order that suits; whatever is left is killed afterwards."""

    @abc.abstractmethod
    def _on_followed_state(self, state: worker_pb2.EngineState) -> None:
        """The state of the engine that the pod is registered with, as it comes over the network."""

    def _replaces_at_once(self, rank: int, ended: ProcessExit) -> bool:
        """Whether a member of a world that served has ended: the rebuilds that follow are counted by the engine."""
        served = self._state is not None and self._state.phase in SERVED
        return self._settings.rebuilds and rank != RENDEZVOUS_RANK and served and judge_refusal(ended) is None

    def _on_hello(self, rank: int, process: Process, port: int) -> None:
        """A rank, or the rendezvous, serves."""
        self._forked.on_hello(rank, process, port)

    def _on_spare(self, process: Process, device_bytes: int) -> None:
        """A spare could be promoted."""
        if self._spares is not None:
            self._spares.on_ready(process, device_bytes)

    def _on_process(self, process: Process) -> None:
        """A process has started, serves or has ended."""
        self._changed.set()

    def _servers(self) -> Sequence[Server]:
        return [self._link, self._service, self._metrics]

    def _tasks(self) -> Iterator[Coroutine[Any, Any, None]]:
        """What goes on as long as the pod lives."""
        if isinstance(self._source, ForkServer):
            yield keep_fork_server(self._source, self._end)
        if self._spares is not None:
            yield self._spares.keep()
        for member in self._members:
            yield self._forked.keep(member)
        yield self._registration.run()
        yield self._watch_progress()
        if self._is_of_hub:
            yield self._watch_model_revision()
        yield self._watch_readiness()
        yield self._drain_when_asked()

    # ------------------------------------------------------------------------------------------- life

    async def run(self) -> Ending:
        """Starts everything, waits for a reason to end, and ends everything; nothing is left in any case."""
        self._health.show(self.status)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._memory.close)
            stack.push_async_callback(self._table.kill_everything)
            for server in self._servers():
                await server.start()
                stack.push_async_callback(server.stop)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(work) for work in self._tasks()]
                ending = await self._ending
                for task in tasks:
                    task.cancel()
            await self._health.set_ready(False)
            await self._end_processes(ending)
        return ending

    def drain(self, reason: str) -> None:
        """Begins to end the gang that this pod belongs to: running requests are finished first. Idempotent."""
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

    def status(self) -> worker_pb2.GangStatusResponse:
        """The gang as this pod knows it, and the pod's processes."""
        return worker_pb2.GangStatusResponse(
            engine=self._state,
            pod=self._settings.pod_uid,
            attempt=self._settings.attempt,
            processes=process_statuses(self._table.processes),
            model_revision=self._settings.model_revision if self._is_of_hub else "",
        )

    @property
    def _is_of_hub(self) -> bool:
        return self._settings.model_uri.startswith(SCHEME)

    def _end(self, ending: Ending) -> None:
        if not self._ending.done():
            self._ending.set_result(ending)

    def _register_request(self) -> worker_pb2.RegisterRequest | None:
        settings, addresses, rendezvous = self._settings, self._forked.addresses(), self._forked.rendezvous_port
        if addresses is None:
            return None
        return worker_pb2.RegisterRequest(
            pod_uid=settings.pod_uid,
            pod_name=settings.pod_name,
            address=settings.address,
            attempt=settings.attempt,
            model_path=settings.model_path,
            supervisor_port=self._service.port,
            ranks=addresses,
            rendezvous=join_host_port(settings.address, rendezvous) if rendezvous is not None else "",
        )

    async def _watch_progress(self) -> None:
        while True:
            ending = self._judge_progress(time.monotonic())
            if ending is not None:
                self._end(ending)
            await asyncio.sleep(_TICK_SECONDS)

    async def _watch_model_revision(self) -> None:
        """Two gangs' first pods may have found their branch at different commits: the one that was recorded stays."""
        mine = self._settings.model_revision
        while True:
            rollouts = read_model_revision(self._settings.gang_dir)
            if rollouts not in ("", mine):
                cause = f"the rollout uses commit {rollouts} of {self._settings.model_uri}, this pod has {mine}"
                self._end(Ending(ExitCode.RESTART_GANG, cause))
            await asyncio.sleep(_REVISION_SECONDS)

    async def _watch_readiness(self) -> None:
        while True:
            self._changed.clear()
            await self._health.set_ready(self._look())
            await self._changed.wait()

    async def _drain_when_asked(self) -> None:
        await self._drain_asked.wait()
        await self._drain()

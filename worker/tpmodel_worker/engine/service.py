"""The engine as a whole: its servers, its world, and how they end together."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import ClassVar

import grpc

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.auth import Expected
from tpmodel_worker.engine.budget import RebuildBudget
from tpmodel_worker.engine.build import WorldBuilder
from tpmodel_worker.engine.committed import CommittedVersion
from tpmodel_worker.engine.control import GangService, start_control_server
from tpmodel_worker.engine.errors import RebuildRefusedError
from tpmodel_worker.engine.front import Front, Key
from tpmodel_worker.engine.generations import Generations, watch
from tpmodel_worker.engine.kv_fetching import KvFetching
from tpmodel_worker.engine.kv_sending import KvSending
from tpmodel_worker.engine.kv_service import KvService
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.members import Members
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.parting import Partings
from tpmodel_worker.engine.persisted import PersistWatch
from tpmodel_worker.engine.pool import PoolTimeouts
from tpmodel_worker.engine.report import SupervisorLink
from tpmodel_worker.engine.requests import UNAVAILABLE, InvalidRequestError, RefusedError, Request
from tpmodel_worker.engine.status import WEIGHTS_INCOMPLETE, WEIGHTS_LOST, EngineStatus
from tpmodel_worker.engine.supervisors import Supervisors
from tpmodel_worker.engine.weight_fetching import WeightFetching
from tpmodel_worker.engine.weight_peers import WeightPeers, weight_set
from tpmodel_worker.engine.weight_sending import WeightSending
from tpmodel_worker.engine.weight_service import WeightService
from tpmodel_worker.engine.weight_updates import WeightUpdates
from tpmodel_worker.engine.world import NOT_BUILT, World
from tpmodel_worker.gang_files import read_rebuild
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
_ENDS = (worker_pb2.PHASE_FAILED, worker_pb2.PHASE_DRAINING, worker_pb2.PHASE_DRAINED)
_NEEDS_RANKS = (worker_pb2.PHASE_LOADING, worker_pb2.PHASE_SERVING, worker_pb2.PHASE_REBUILDING)


class UnavailableError(RefusedError):
    """There is no world that takes requests now."""

    code: ClassVar[int] = UNAVAILABLE


class Engine:
    """One engine process's parts: start(), wait(), stop()."""

    def __init__(self, settings: ServeSettings, *, timeouts: PoolTimeouts | None = None) -> None:
        self._settings = settings
        self.instance_id = uuid.uuid4().hex
        self.status = EngineStatus(self.instance_id, settings.world_size, settings.model_id, settings.max_model_len)
        self._wake = asyncio.Event()
        self._members = Members(settings.world_size, settings.attempt, settings.model_path)
        self._front = Front(settings.front_socket, self, self.status)
        self._supervisors = Supervisors(
            settings.token, settings.attempt, on_exit=self._rank_exited, on_failure=logger.warning
        )
        metrics = EngineMetrics()
        committed = CommittedVersion(settings.gang_dir, [settings.weights_version_file])
        self._peers = WeightPeers(
            settings.weights_from,
            token=Expected.trainer_token(settings.trainer_token_file).read,
            address=settings.address,
        )
        self.world = World(
            settings,
            WorldBuilder(
                settings,
                status=self.status,
                wake=self._wake.set,
                committed=committed,
                peers=self._peers,
                timeouts=timeouts,
            ),
            self._members,
            self._supervisors,
            RebuildBudget(
                settings.rebuilds_file,
                attempt=settings.attempt,
                limit=settings.rebuild_limit,
                stability_window=settings.rebuild_stability_window,
            ),
            wake=self._wake,
            sink=self._front.deliver,
            status=self.status,
            metrics=metrics,
        )
        self._generations = Generations(self.world.newer_generation)
        self._watch_task: asyncio.Task[None] | None = None
        self.weights = WeightUpdates(
            self.world,
            self.status,
            committed,
            metrics,
            PersistWatch(self.status, metrics) if settings.persist_updates else None,
        )
        self._weight_sending = WeightSending(
            self.world,
            settings,
            metrics,
            served=lambda: self.weights.served,
            updating=lambda: self.weights.updating,
        )
        self._weight_fetching = WeightFetching(
            self.world,
            settings,
            self.status,
            metrics,
            self._peers,
            updating=lambda: self.weights.updating,
            adopt=self.weights.adopt,
        )
        self.weights.before_start = self._copies_give_way
        self._kv_sending = KvSending(self.world, self.status, deadline_seconds=settings.kv_transfer_deadline)
        self._kv_fetching = KvFetching(self.world, token=settings.token, deadline_seconds=settings.kv_transfer_deadline)
        self.world.on_serving = self._world_serves
        self._partings = Partings(
            self.world,
            self._members,
            self.status,
            timeout=settings.drain_timeout,
            propagation=settings.endpoint_propagation,
        )
        self._link = SupervisorLink(settings.report_socket, self.status, self.drain)
        self._refusing = False
        self._control: grpc.aio.Server | None = None
        self._world_task: asyncio.Task[None] | None = None
        self._link_task: asyncio.Task[None] | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self.control_port = settings.control_port

    async def start(self) -> None:
        """Opens the front socket and the control port, and begins to form the world."""
        settings = self._settings
        await self._front.start()
        service = GangService(
            self._members, self.status, self, attempt=settings.attempt, model_path=settings.model_path
        )
        self._control, self.control_port = await start_control_server(
            settings,
            service,
            WeightService(self.weights, self._weight_sending, self._weight_set),
            KvService(self._kv_sending),
        )
        self._peers.own_port = self.control_port
        self._link_task = asyncio.create_task(self._link.run(), name="supervisor link")
        self._world_task = asyncio.create_task(self.world.run(), name="world")
        if settings.rebuilds and settings.gang_dir:
            watching = watch(lambda: read_rebuild(settings.gang_dir), "operator", self._generations)
            self._watch_task = asyncio.create_task(watching, name="rebuild requests of the operator")

    async def wait(self, stopped: asyncio.Event) -> None:
        """Returns when `stopped` is set; a failed world is only reported. Raises what broke the engine itself."""
        stopping = asyncio.create_task(stopped.wait())
        watched: set[asyncio.Task[None] | asyncio.Task[bool]] = {stopping}
        tasks = (self._world_task, self._link_task, self._watch_task)
        watched |= {task for task in tasks if task is not None}
        try:
            while stopping in watched:
                done, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.cancelled():
                        task.result()
        finally:
            stopping.cancel()

    def drain(self, timeout: float, cause: str = "") -> None:
        """Ends the world once running requests are done or time is up.

        New ones are taken until others can know that they should go elsewhere (endpoint_propagation), then refused.
        """
        if self._drain_task is None:
            self._partings.cancel()
            self._drain_task = asyncio.create_task(self._drain(timeout, cause), name="drain")

    def pod_drains(self, uid: str, name: str) -> None:
        """A pod of the gang got SIGTERM, and no world is without its ranks.

        Mode InPlace waits for its successor; otherwise the gang drains as a whole.
        """
        if not self._settings.rebuilds:
            self.drain(self._settings.drain_timeout, f"pod {name} drains")
        elif self._drain_task is None:
            self._partings.begin(uid, name)

    def give_way(self, attempt: int) -> None:
        """The gang is at a higher attempt: this engine must not serve beside its successor, and says so."""
        message = f"the gang is at attempt {attempt}, this engine is of attempt {self._settings.attempt}"
        self.world.fail_as_stale(message)

    def members_changed(self) -> None:
        """A registration brought something new."""
        self._show_members()
        if self._settings.rebuilds:
            self._supervisors.follow(self._members.supervisors)
        self.world.registered()

    def rebuild(self, source: str, generation: int) -> tuple[bool, int]:
        """Asks for the next world; whether that was news, and the source's newest generation.

        generation: 0: the one above the last. Raises RebuildRefusedError.
        """
        if not self._settings.rebuilds:
            raise RebuildRefusedError("this gang is in mode Restart: it is restarted, never rebuilt")
        if self.status.phase in _ENDS:
            phase = worker_pb2.Phase.Name(self.status.phase).removeprefix("PHASE_").lower()
            raise RebuildRefusedError(f"the gang is {phase}: it takes no other world")
        accepted = self._generations.observe(source, generation or self._generations.newest(source) + 1)
        return accepted, self._generations.newest(source)

    def _rank_exited(self, rank: int, pid: int, how: str) -> None:
        if self._members.lost(rank, pid):
            level = logging.WARNING if self.status.phase in _NEEDS_RANKS else logging.INFO
            logger.log(level, "rank %d: %s", rank, how, extra={"epoch": self.status.state.epoch, "rank": rank})
            self._show_members()
            self.world.rank_exited(rank, pid, how)

    def _show_members(self) -> None:
        self.status.set_members(
            worker_pb2.RankState(rank=endpoint.rank, pid=endpoint.pid, pod=endpoint.pod, state="connected")
            for endpoint in self._members.endpoints.values()
        )

    def _world_serves(self, loop: ServingLoop) -> None:
        loop.on_fetch, loop.on_fetch_dropped = self._kv_fetching.begin, self._kv_fetching.drop
        self.weights.world_serves(loop)
        self._weight_fetching.world_serves()
        self._partings.world_serves()

    async def _copies_give_way(self) -> None:
        """A trainer's update is about to take the weights."""
        await self._weight_sending.give_way("a trainer's update began")
        await self._weight_fetching.give_way()

    def _weight_set(self) -> weights_pb2.WeightSet | None:
        kv = self.world.kv
        return weight_set(self._settings, kv.layout) if kv is not None else None

    async def stop(self) -> None:
        """Ends everything at once: requests fail, ranks hear Bye. Bounded, idempotent."""
        for task in (self._drain_task, self._link_task, self._watch_task):
            if task is not None:
                task.cancel()
        self._partings.cancel()
        if self.world.loop is not None:
            self.world.loop.fail_all("the engine was stopped")
        await self._weight_fetching.close()
        await self.weights.close()
        await self._kv_fetching.close()
        await self._end_world()
        await self._supervisors.close()
        await self._front.stop()
        if self._control is not None:
            await self._control.stop(grace=0)
        tasks = (self._drain_task, self._link_task, self._watch_task)
        remaining = [task for task in tasks if task is not None]
        await asyncio.gather(*remaining, return_exceptions=True)

    # ------------------------------------------------------------------------------------ requests

    def submit(self, request: Request) -> None:
        """Takes a request of an api process. Raises RefusedError."""
        if self._refusing:
            raise UnavailableError("draining: this gang takes no new requests")
        if self.world.loop is None:
            state = self.status.state
            detail = f": {state.cause}" if state.cause else ""
            raise UnavailableError(f"{NOT_BUILT}{detail}")
        if self.status.weights_condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST):
            raise UnavailableError(f"{self.status.weights_condition}: {self.status.state.weights_message}")
        source, known = request.kv_source, self._settings.kv_sources
        if source is not None and source.target not in known:
            names = ", ".join(known) or "none: --kv-from names them"
            message = f"kv_source.target: {source.target!r} is no gang that this one fetches from ({names})"
            raise InvalidRequestError(message)
        self.world.loop.submit(request)

    def cancel(self, key: Key, sample_index: int | None = None) -> bool:
        """Ends a request or one sample of it; False where it was not live."""
        return self.world.loop is not None and self.world.loop.cancel(key, sample_index)

    # ---------------------------------------------------------------------------------------- ends

    async def _drain(self, timeout: float, cause: str) -> None:
        logger.info("draining: running requests have %.0f s", timeout, extra={"cause": cause})
        end = time.monotonic() + timeout
        propagation = min(self._settings.endpoint_propagation, timeout)
        if self.world.loop is not None and propagation:
            self.status.set_leaving(cause)
            await asyncio.sleep(propagation)
        self._refusing = True
        if self.status.phase != worker_pb2.PHASE_FAILED:
            self.status.set_phase(worker_pb2.PHASE_DRAINING, cause=cause)
        loop = self.world.loop
        if loop is not None and not await loop.idle(end - time.monotonic()):
            logger.warning("the drain's %.0f s are over: ending what still runs", timeout)
            loop.fail_all("draining: the gang's time is up")
        await self._end_world()
        if self.status.phase != worker_pb2.PHASE_FAILED:
            self.status.set_phase(worker_pb2.PHASE_DRAINED, cause=cause)

    async def _end_world(self) -> None:
        """Stops serving, or forming; the ranks hear Bye."""
        task = self._world_task
        if task is None:
            return
        if self.world.loop is not None:
            self.world.stop()
        elif not self.world.built:
            task.cancel()
        await asyncio.wait([task], timeout=_CLOSE_SECONDS)
        await self.world.close()

"""The engine's part of weight updates over real ranks' parts of it, without processes between.

A test can make one rank fail, or wait, at any step, which no whole server can be made to do at will.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from prometheus_client import CollectorRegistry

from support.update_ranks import HOST, KEY, Rank, World
from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.engine.committed import CommittedVersion
from tpmodel_worker.engine.errors import PoolError, RankFailure
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.scheduler import Scheduler, SchedulerConfig
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.weight_choice import choose_version
from tpmodel_worker.engine.weight_errors import UpdateError
from tpmodel_worker.engine.weight_updates import WeightUpdates
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.member import GroupMember
from tpmodel_worker.weights.packing import describe, write_update
from tpmodel_worker.weights.ranks import TRAINER

CONFIG = SchedulerConfig(
    num_blocks=32, block_size=4, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, queue_limit=2,
    prefix_cache=True,
)  # fmt: skip
Hook = Callable[[], None]
"""Called in a rank's thread before it takes a step, or by the trainer."""


class RankPool:
    """Has the part of Pool that updates use; a rank that raises is one that answers with an error."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = ranks
        self.world_size = len(ranks)
        self.epoch = 1
        self.error: PoolError | None = None
        self.cleared = 0
        self.before: dict[tuple[str, int], Hook] = {}
        """By step and rank."""

    async def control(
        self, requests: Sequence[worker_pb2.WeightUpdateRequest], _patience: object
    ) -> list[worker_pb2.SessionResponse]:
        took = [asyncio.to_thread(self._step, *pair) for pair in zip(self.ranks, requests, strict=True)]
        answers = await asyncio.gather(*took)
        failures = [answer for answer in answers if isinstance(answer, RankFailure)]
        if failures:
            raise PoolError("weight_update", ranks=failures)
        return [answer for answer in answers if isinstance(answer, worker_pb2.SessionResponse)]

    def fault(self, what: str, cause: Exception) -> None:
        self.error = PoolError(what, engine=cause)

    async def statuses(self) -> list[worker_pb2.GetStatusResponse]:
        return [worker_pb2.GetStatusResponse(device="cpu", weight_update=rank.status) for rank in self.ranks]

    async def clear_kv_cache(self, _blocks: int) -> None:
        self.cleared += 1

    def _step(self, rank: Rank, request: worker_pb2.WeightUpdateRequest) -> worker_pb2.SessionResponse | RankFailure:
        step = request.WhichOneof("step") or ""
        try:
            self.before.get((step, rank.rank), lambda: None)()
            with torch.inference_mode():
                return worker_pb2.SessionResponse(weight_update_ok=rank.updates.execute(request))
        except RequestError as error:
            return RankFailure(rank.rank, str(error), error.kind)
        except (ArenaError, OSError, RuntimeError) as error:
            return RankFailure(rank.rank, str(error), worker_pb2.ERROR_KIND_INTERNAL)


class UpdatedEngine:
    """One engine's updates; calls are those of WeightService."""

    def __init__(self, world: World, folder: Path, ranks: int = 2, *, loaded: bool = True) -> None:
        """loaded: whether the ranks have told the engine what they have."""
        self.ranks = world.ranks(ranks)
        self.rank_pool = RankPool(self.ranks)
        self.pool: Pool | None = cast("Pool", self.rank_pool)
        self.status = EngineStatus("instance", ranks, "m", 64)
        if loaded:
            self.status.set_loaded_versions([0] * ranks)
        registry = CollectorRegistry()
        metrics = EngineMetrics(registry)
        self.loop: ServingLoop | None = ServingLoop(
            Scheduler(CONFIG, clock=time.time, weight_version=0),
            wake=asyncio.Event(),
            sink=lambda _outputs: None,
            status=self.status,
            metrics=metrics,
        )
        self.kv = None
        self.committed = CommittedVersion("", [folder / "weights-version"])
        self.updates = WeightUpdates(self, self.status, self.committed, metrics, None)
        self.world = world
        self.before = [rank.parameters() for rank in self.ranks]
        self._store = start_store(HOST)
        self._group: Communicator | None = None
        self.session = ""

    async def init(self, *, shadow: bool, deadline_seconds: float = 10.0) -> None:
        self._leave()
        self._store = start_store(HOST)
        request = weights_pb2.InitUpdateRequest(
            master_address=HOST,
            master_port=self._store.port,
            rank_offset=1,
            world_size=1 + len(self.ranks),
            mode=weights_pb2.UPDATE_MODE_SHADOW if shadow else weights_pb2.UPDATE_MODE_IN_PLACE,
            timeout_seconds=20,
            deadline_seconds=deadline_seconds,
        )
        member = GroupMember(
            master_address=HOST,
            master_port=self._store.port,
            rank=TRAINER,
            size=1 + len(self.ranks),
            device=torch.device("cpu"),
            address=HOST,
            timeout_seconds=20,
            deadline_seconds=deadline_seconds,
        )
        joining = asyncio.ensure_future(asyncio.to_thread(join_update_group, member, key=KEY))
        try:
            self.session = await self.updates.init(request, KEY)
        except UpdateError:
            # It has nobody to join, and says so.
            await asyncio.wait({joining})
            assert isinstance(joining.exception(), CommunicatorError)
            raise
        self._group = await joining

    async def start(self) -> None:
        await self.updates.start(weights_pb2.RUNNING_REQUESTS_KEEP, self.session)

    async def finish(self, version: int) -> list[weights_pb2.UpdatePhase]:
        """A FinishUpdate call."""
        return await self.updates.finish(version, self.session)

    async def abort(self, reason: str) -> None:
        """An AbortUpdate call."""
        await self.updates.abort(reason, self.session)

    async def send(self, weights: Mapping[str, torch.Tensor]) -> None:
        """A whole Update call."""
        assert self._group is not None
        infos = [describe(name, tensor) for name, tensor in weights.items()]
        request = write_update(infos, packed=True, buffer_size=20_000, buffer_count=2)
        request.session = self.session
        sender = Broadcaster(self._group, infos, buffer_size=20_000, buffer_count=2)
        sending: asyncio.Future[None] | None = None
        async for response in self.updates.update(request):
            if response.stage == weights_pb2.UpdateResponse.STAGE_READY:
                arguments = (weights.__getitem__, lambda _done: None, 10.0)
                sending = asyncio.ensure_future(asyncio.to_thread(sender.send, *arguments))
        assert sending is not None
        await sending

    async def receive(self, weights: Mapping[str, torch.Tensor], *, then: Hook = lambda: None) -> None:
        """An Update call for which nothing is sent; then: called once the ranks wait."""
        infos = [describe(name, tensor) for name, tensor in weights.items()]
        request = write_update(infos, packed=True, buffer_size=20_000, buffer_count=2)
        request.session = self.session
        async for _ in self.updates.update(request):
            then()

    async def update(self, version: int, *, shadow: bool, weights: Mapping[str, torch.Tensor]) -> None:
        """A whole one."""
        await self.up_to_finish(shadow=shadow, weights=weights)
        await self.finish(version)

    async def up_to_finish(self, *, shadow: bool, weights: Mapping[str, torch.Tensor]) -> None:
        """Everything but the end of an update."""
        await self.init(shadow=shadow)
        await self.start()
        await self.send(weights)

    def build_again(self) -> None:
        """The next world, with the same processes: as the engine's builder does."""
        find = worker_pb2.WeightUpdateRequest(find_persisted=worker_pb2.FindPersisted())
        with torch.inference_mode():
            found = [rank.updates.execute(find) for rank in self.ranks]
        version = choose_version(found, known=max(self.status.state.weight_version, self.committed.read()))
        for rank in self.ranks:
            rank.load_again(version)
        self.status.set_loaded_versions([rank.version for rank in self.ranks], self.committed.read())
        before, self.rank_pool = self.rank_pool, RankPool(self.ranks)
        self.rank_pool.epoch = before.epoch + 1
        self.pool = cast("Pool", self.rank_pool)
        assert self.loop is not None
        self.updates.world_serves(self.loop)

    def sets(self) -> list[dict[int, int]]:
        """By rank: versions of the whole sets that its supervisor holds."""
        return [self.world.sets(rank.rank) for rank in self.ranks]

    def lose_the_trainer(self) -> None:
        """Its store is gone; what else it had stays, as it would over NCCL."""
        self._store = start_store(HOST)

    def unchanged(self) -> bool:
        """Whether every rank has the version and the weights from before, and its supervisor says so."""
        return all(
            rank.version == 0
            and self.world.manifest(rank.rank).state == worker_pb2.ARENA_STATE_COMPLETE
            and self.world.manifest(rank.rank).weight_version == 0
            and all(torch.equal(tensor, old[name]) for name, tensor in rank.parameters().items())
            for rank, old in zip(self.ranks, self.before, strict=True)
        )

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort("the trainer leaves")
            group.close()

    async def close(self) -> None:
        await self.updates.close()
        self._leave()
        for rank in self.ranks:
            await asyncio.to_thread(rank.updates.leave, "the test is over")


class Gate:
    """A hook that keeps a rank at its step until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._open.wait(60)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Open behind the block, whatever happens in it."""
        try:
            yield
        finally:
            self._open.set()

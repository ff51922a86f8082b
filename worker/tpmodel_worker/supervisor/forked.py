"""The pod's forked processes: its ranks and, in the leader pod, the rendezvous store. Keeps each of them alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.supervisor.lifecycle import Ending, RestartPolicy, judge_repeated
from tpmodel_worker.supervisor.processes import Process, ProcessExit, ProcessStartError, ProcessTable
from tpmodel_worker.supervisor.rank_link import RankLinkServer
from tpmodel_worker.supervisor.service import RespawnError, StaleEpochError
from tpmodel_worker.supervisor.sources import ProcessSource
from tpmodel_worker.supervisor.spares import Spares

T = TypeVar("T")

_log = logging.getLogger(__name__)

Judge = Callable[[int, ProcessExit], T]
"""Says what the end of a member (its rank) means."""


def _never(_rank: int, _ended: ProcessExit) -> bool:
    return False


@dataclass(slots=True)
class _Member:
    """One rank, or the rendezvous, through all its processes."""

    rank: int
    process: Process | None = None
    hello: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    epoch: int = 0
    replaced: Process | None = None
    """A process that was ended on purpose: its end is no fault."""

    @property
    def role(self) -> str:
        return "rendezvous" if self.rank == RENDEZVOUS_RANK else "rank"

    @property
    def name(self) -> str:
        return "rendezvous" if self.rank == RENDEZVOUS_RANK else f"rank {self.rank}"

    @property
    def serves(self) -> bool:
        return self.process is not None and self.process.alive and self.hello.is_set()


class ForkedProcesses:
    """Starts the members, starts them again when they end before a world has served, and replaces ranks on demand."""

    def __init__(
        self,
        members: Iterable[int],
        table: ProcessTable,
        source: ProcessSource,
        link: RankLinkServer,
        *,
        hello_seconds: float,
        judge: Judge[Ending | None],
        end_pod: Callable[[Ending], None],
        on_change: Callable[[], None],
        spares: Spares | None = None,
        replaces_at_once: Judge[bool] = _never,
    ) -> None:
        """Args:
        members: ranks; RENDEZVOUS_RANK for the rendezvous.
        table: where the processes go.
        source: where new processes come from.
        link: where they say hello.
        hello_seconds: how long a process may take to say hello.
        judge: says whether a member's end ends the pod.
        end_pod: called when one does.
        on_change: called when an address has come or gone.
        spares: processes that replace ranks at once, where there are some.
        replaces_at_once: whether the end of a member that served is the engine's to count and to slow down.
        """
        self._members = {rank: _Member(rank) for rank in members}
        self._table = table
        self._source = source
        self._spares = spares
        self._link = link
        self._restarts = True
        self._hello_seconds = hello_seconds
        self._judge = judge
        self._end_pod = end_pod
        self._on_change = on_change
        self._replaces_at_once = replaces_at_once

    @property
    def processes(self) -> list[Process]:
        """The members' newest processes."""
        return [member.process for member in self._members.values() if member.process is not None]

    @property
    def rendezvous_port(self) -> int | None:
        """Where the rendezvous store listens; None while it does not, or belongs to another pod."""
        member = self._members.get(RENDEZVOUS_RANK)
        return member.process.port if member is not None and member.process is not None and member.serves else None

    def addresses(self) -> list[worker_pb2.RankAddress] | None:
        """Pid and port of every rank; None while one of the members does not serve."""
        found = []
        for member in self._members.values():
            if member.process is None or not member.serves:
                return None
            if member.rank != RENDEZVOUS_RANK:
                process = member.process
                found.append(worker_pb2.RankAddress(rank=member.rank, pid=process.pid, port=process.port))
        return found

    @property
    def serving(self) -> int:
        """How many of the ranks serve."""
        return sum(member.serves for member in self._members.values() if member.rank != RENDEZVOUS_RANK)

    def rank_of(self, process: Process) -> int | None:
        """Which rank a process is or was; None for other processes."""
        names = {member.name: member.rank for member in self._members.values() if member.rank != RENDEZVOUS_RANK}
        return names.get(process.name)

    def on_hello(self, rank: int, process: Process, port: int) -> None:
        """Called by the rank socket when a member serves."""
        member = self._members[rank]
        if process is member.process:
            self._table.mark_running(process, port)
            member.hello.set()
            if self._spares is not None:
                self._spares.allow(self.addresses() is not None)
            self._on_change()

    def stop_restarting(self) -> None:
        """From now on members that end are not started again: the pod drains."""
        self._restarts = False

    async def keep(self, rank: int) -> None:
        """Keeps one member alive, until its end ends the pod or the pod drains."""
        member = self._members[rank]
        while True:
            try:
                async with member.lock:
                    if member.process is None or not member.process.alive:
                        await self._start(member)
                process = member.process
                assert process is not None
                await self._require_hello(member, process)
            except ProcessStartError as error:
                if not await self._pause_or_give_up(member, error):
                    return
                continue
            ended = await process.ended()
            self._on_change()
            if process is member.replaced:
                continue
            if member.hello.is_set() and self._restarts and self._replaces_at_once(rank, ended):
                _log.warning("%s; starting another", ended.describe())
                continue
            pause = member.policy.pause(time.monotonic())
            ending = self._judge(rank, ended) or judge_repeated(ended, member.policy)
            if ending is not None:
                self._end_pod(ending)
                return
            if not self._restarts:
                return
            _log.warning("%s; starting it again in %.1f s", ended.describe(), pause)
            await asyncio.sleep(pause)

    async def _pause_or_give_up(self, member: _Member, error: ProcessStartError) -> bool:
        """Notes that a member could not be started, and whether to try again, after the pause that it makes."""
        pause = member.policy.pause(time.monotonic())
        _log.warning("%s could not be started: %s", member.name, error)
        if member.policy.exhausted:
            self._end_pod(Ending(ExitCode.RESTART_GANG, f"{member.name} could not be started: {error}"))
            return False
        await asyncio.sleep(pause)
        return True

    async def respawn(self, rank: int, epoch: int) -> Process:
        """Replaces a rank (a live process is killed first) and returns the new one once it said hello.

        Raises:
            KeyError: no rank of this pod.
            StaleEpochError: the rank was replaced for a newer epoch before.
            RespawnError: the new process did not come up.
        """
        if rank == RENDEZVOUS_RANK:
            raise KeyError(rank)
        member = self._members[rank]
        async with member.lock:
            if epoch < member.epoch:
                raise StaleEpochError(f"epoch {epoch} is older than {member.epoch}, for which rank {rank} was replaced")
            member.epoch = epoch
            if member.process is not None and member.process.alive:
                member.replaced = member.process
                await self._table.kill([member.process])
            try:
                process = await self._start(member)
                await self._require_hello(member, process)
                if self._spares is not None and not member.serves:
                    # A spare that was dying when it was promoted.
                    process = await self._start(member, promote=False)
                    await self._require_hello(member, process)
            except ProcessStartError as error:
                raise RespawnError(f"rank {rank} could not be started: {error}") from error
            if not member.serves:
                raise RespawnError(f"rank {rank} (pid {process.pid}) did not say hello")
            return process

    async def kill(self, rank: int, pid: int) -> bool:
        """SIGKILLs a rank whose pid is the given one; whether it was. Raises KeyError for no rank of this pod."""
        process = self._members[rank].process
        if process is None or process.pid != pid or not process.alive:
            return False
        await self._table.kill([process])
        return True

    async def _start(self, member: _Member, *, promote: bool = True) -> Process:
        """promote: take a spare where there is one; the rendezvous never comes from one."""
        member.hello.clear()
        spare = None
        if self._spares is not None:
            self._spares.allow(False)
            spare = self._spares.take() if promote and member.role == "rank" else None
        if spare is not None:
            member.process = spare
            self._table.promote(spare, member.name)
            await self._link.promote(spare, member.rank)
            return spare
        process = await self._source.new_process(
            member.role, member.name, rank=member.rank if member.role == "rank" else 0
        )
        member.process = process
        await self._link.expect(member.rank, process)
        return process

    async def _require_hello(self, member: _Member, process: Process) -> None:
        """Returns once the process said hello or ended; kills it when it does neither in time."""
        hello = asyncio.create_task(member.hello.wait())
        try:
            done, _ = await asyncio.wait(
                [hello, process.exited], timeout=self._hello_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            hello.cancel()
        if not done:
            _log.error("%s (pid %d) said no hello in %.0f s", member.name, process.pid, self._hello_seconds)
            await self._table.kill([process])

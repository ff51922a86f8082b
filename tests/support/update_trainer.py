"""The trainer's side of the ranks' part of weight updates, without an engine between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch._C._distributed_c10d import TCPStore

from support.update_ranks import CPU, HOST, KEY, Rank, Weights
from support.waiting import until
from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.member import GroupMember, Rehearsal
from tpmodel_worker.weights.packing import describe, write_update
from tpmodel_worker.weights.ranks import TRAINER


def begin_join(ranks: Sequence[Rank], **fields: Any) -> TCPStore:
    """A new store, at which the ranks wait for rank 0 of the group. fields: of their JoinUpdate."""
    store = start_store(HOST)
    join = pb.JoinUpdate(master_address=HOST, master_port=store.port, group_size=1 + len(ranks), **fields)
    for rank in ranks:
        join.group_rank = 1 + rank.rank
        rank.step(join=join)
    return store


def wait_for_step(ranks: Sequence[Rank], step: int) -> list[str]:
    """Waits until the ranks' threads are through with it; their errors."""
    until(lambda: all(rank.status.done and rank.status.step == step for rank in ranks), "the ranks' threads are done")
    return [rank.status.error for rank in ranks]


class Trainer:
    """The other side, without the engine between."""

    def __init__(
        self,
        ranks: Sequence[Rank],
        *,
        deadline_seconds: float = 10.0,
        key: str = KEY,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.ranks = ranks
        self.steps = 0
        store = begin_join(
            ranks,
            timeout_seconds=10,
            deadline_seconds=deadline_seconds,
            key=KEY,
            rehearsal=weights_pb2.UpdateRehearsal(**asdict(rehearsal)) if rehearsal is not None else None,
        )
        member = GroupMember(
            master_address=HOST,
            master_port=store.port,
            rank=TRAINER,
            size=1 + len(ranks),
            device=CPU,
            address=HOST,
            timeout_seconds=10,
            deadline_seconds=deadline_seconds,
            rehearsal=rehearsal,
        )
        self.group: Communicator = join_update_group(member, key=key)
        self.wait()

    def wait(self) -> list[str]:
        """Waits for the ranks' threads; their errors."""
        return wait_for_step(self.ranks, self.steps)

    def begin(self, *, shadow: bool = False) -> None:
        for rank in self.ranks:
            rank.step(begin=pb.BeginUpdate(shadow=shadow))

    def announce(self, weights: Weights, **layout: object) -> Broadcaster:
        """All ranks check and wait; what sends it then."""
        fields = {"packed": True, "buffer_size": 20_000, "buffer_count": 2} | layout
        infos = [describe(name, tensor) for name, tensor in weights.items()]
        update = write_update(infos, **fields)  # type: ignore[arg-type]
        self.steps += 1
        for rank in self.ranks:
            rank.step(check=update)
        for rank in self.ranks:
            rank.step(receive=pb.ReceiveWeights(update=update, step=self.steps))
        size = update.buffer_size if update.packed else 0
        return Broadcaster(self.group, infos, buffer_size=size, buffer_count=2)

    def send(self, weights: Weights, **layout: object) -> None:
        self.announce(weights, **layout).send(weights.__getitem__, lambda _done: None, 10)
        assert self.wait() == [""] * len(self.ranks)

    def commit(self, version: int) -> None:
        for rank in self.ranks:
            rank.step(prepare=pb.PrepareCommit(version=version))
        for rank in self.ranks:
            rank.step(commit=pb.CommitUpdate(version=version))
        for rank in self.ranks:
            rank.step(confirm=pb.ConfirmCommit())

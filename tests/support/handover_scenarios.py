"""Ranks of two gangs that hand requests over, without engines. Process 0 has all that send, process 1 all that receive.

Each function runs in a process of its own (see rank_processes); offers go through a folder instead of through engines.
"""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import torch

from support.waiting import until
from tpmodel.v1 import kv_pb2, worker_pb2
from tpmodel_worker.kv.handover import Outcome
from tpmodel_worker.kv.layout import KvLayout
from tpmodel_worker.kv.plan import plan_transfer
from tpmodel_worker.kv.rank_handovers import Handovers
from tpmodel_worker.kv.transfer import RequestCache
from tpmodel_worker.models.batch import LayerKvCache

SENDS, RECEIVES = 0, 1
HOST = "127.0.0.1"
DEADLINE = 20.0
BLOCK = 16
LAYERS, KV_HEADS = 12, 4


class Side:
    """All ranks of one gang."""

    def __init__(self, side: int, senders: int, receivers: int, folder: str, head_dim: int = 16) -> None:
        self._sends = side == SENDS
        self._folder = Path(folder)
        shapes = [_layout(senders, head_dim), _layout(receivers, head_dim)]
        self.plan = plan_transfer(*shapes)
        self._shape = shapes[side]
        self._ranks = [
            Handovers(rank=rank, device=torch.device("cpu"), device_id="", address=HOST, token="secret")
            for rank in range(self._shape.ranks)
        ]

    def begin(self, name: str, tokens: int, world: str = "a world") -> list[RequestCache]:
        """Every rank begins; what each of them sends from, or receives into."""
        caches = [self._cache(rank, tokens) for rank in range(self._shape.ranks)]
        request = worker_pb2.KvTransferRequest(transfer=name, deadline_seconds=DEADLINE)
        if self._sends:
            request.send.CopyFrom(worker_pb2.SendKv(world=world))
            endpoints = [
                endpoint
                for handovers, cache in zip(self._ranks, caches, strict=True)
                for endpoint in handovers.send(request, self.plan, cache)
            ]
            self.tell(name, kv_pb2.KvOffer(endpoints=endpoints).SerializeToString())
        else:
            request.receive.endpoints.extend(kv_pb2.KvOffer.FromString(self.hear(name)).endpoints)
            for handovers, cache in zip(self._ranks, caches, strict=True):
                handovers.receive(request, self.plan, cache)
        return caches

    def finish(self, name: str) -> list[Outcome]:
        """How every rank's part has ended."""
        outcomes = []
        for handovers in self._ranks:
            handover = handovers.find(name)
            assert handover is not None
            outcomes.append(handover.outcome.result(60))
            handovers.forget(name)
        return outcomes

    def move(self, name: str, tokens: int, world: str = "a world") -> None:
        """A whole transfer, which succeeds; who receives has what was sent."""
        caches = self.begin(name, tokens, world)
        outcomes = self.finish(name)
        assert not any(outcome.error for outcome in outcomes), outcomes
        for rank, cache in enumerate(caches):
            self.check(rank, cache)

    def check(self, rank: int, cache: RequestCache) -> None:
        """Every number is where it belongs."""
        expected = self._cache(rank, cache.tokens, filled=True)
        rows = cache.rows()
        for layer, wanted in zip(cache.kv, expected.kv, strict=True):
            assert torch.equal(layer.keys.flatten(0, 1)[rows], wanted.keys.flatten(0, 1)[rows])
            assert torch.equal(layer.values.flatten(0, 1)[rows], wanted.values.flatten(0, 1)[rows])

    def close_pipes(self) -> None:
        """As at the end of an epoch."""
        for handovers in self._ranks:
            handovers.close_pipes("the test says so")

    def end(self) -> None:
        """Waits until everything is given back."""
        self.close_pipes()
        until(nothing_left, "nothing is left open")

    def tell(self, name: str, data: bytes = b"") -> None:
        """The other side hears it."""
        unfinished = self._folder / f"{name}.unfinished"
        unfinished.write_bytes(data)
        unfinished.rename(self._folder / name)

    def hear(self, name: str) -> bytes:
        """What the other side tells."""
        until((self._folder / name).exists, f"word of {name}")
        return (self._folder / name).read_bytes()

    def meet(self, name: str) -> None:
        """Both sides have come so far."""
        mine, others = ("sender", "receiver") if self._sends else ("receiver", "sender")
        self.tell(f"{name} {mine}")
        self.hear(f"{name} {others}")

    def _cache(self, rank: int, tokens: int, *, filled: bool = False) -> RequestCache:
        heads = self._shape.heads_of(rank)
        count = -(-tokens // BLOCK)
        blocks = torch.randperm(count + 2, generator=torch.Generator().manual_seed(int(self._sends)))[:count].tolist()
        size = (count + 2, BLOCK, len(heads), self._shape.head_dim)
        cache = RequestCache(
            [LayerKvCache(torch.zeros(size), torch.zeros(size)) for _ in range(LAYERS)], [], BLOCK, blocks, 0, tokens
        )
        if self._sends or filled:
            # token, then head, layer and kind: all different.
            numbers = torch.arange(tokens).view(-1, 1, 1) * 1000 + torch.tensor(heads).view(1, -1, 1) * 100
            rows = cache.rows()
            for number, layer in enumerate(cache.kv):
                layer.keys.flatten(0, 1)[rows] = (numbers + 2 * number).expand(-1, -1, size[-1]).float()
                layer.values.flatten(0, 1)[rows] = (numbers + 2 * number + 1).expand(-1, -1, size[-1]).float()
        return cache


def _layout(ranks: int, head_dim: int) -> KvLayout:
    return KvLayout(
        model_id="test",
        config_digest="",
        dtype="float32",
        layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        block_size=BLOCK,
        ranks=ranks,
    )


def connections() -> set[tuple[int, int]]:
    """Of this process, by both ends' ports."""
    return {
        (entry.laddr.port, entry.raddr.port)
        for entry in psutil.Process().net_connections()
        if entry.status == psutil.CONN_ESTABLISHED
    }


def nothing_left() -> bool:
    """No connection, and no thread of a pipe or transfer."""
    names = {thread.name for thread in threading.enumerate()}
    return not connections() and not any(name.startswith(("kv", "handover")) for name in names)


def several(rank: int, senders: int, receivers: int, folder: str) -> bool:
    """Transfers of other lengths one after the other; whether later ones open no connection."""
    side = Side(rank, senders, receivers, folder)
    side.move("first", 40)
    opened = connections()
    for number, tokens in enumerate((40, 7, 300)):
        side.move(f"later {number}", tokens)
    side.meet("moved")
    same = connections() == opened and bool(opened)
    side.meet("seen")
    side.end()
    return same


def at_a_time(rank: int, folder: str) -> bool:
    """One transfer, then three at the same time, twice; whether all seven have opened three pipes at most."""
    side = Side(rank, 2, 2, folder)
    side.move("first", 200)
    first = connections()
    # How many of the three overlap is chance.
    for turn in range(2):
        names = [f"{turn} {number}" for number in range(3)]
        begun = {name: side.begin(name, 200) for name in names}
        for name in names:
            assert not any(outcome.error for outcome in side.finish(name))
            for of_rank, cache in enumerate(begun[name]):
                side.check(of_rank, cache)
        side.meet(f"moved {turn}")
    last = connections()
    side.end()
    return len(last) <= 3 * len(first)


def after_a_fault(rank: int, folder: str) -> list[str]:
    """The second transfer's pipe is closed amid it, at the end that receives; the errors of it, after a third one."""
    side = Side(rank, 1, 1, folder, head_dim=256)
    side.move("first", 16)
    opened = connections()
    if rank == RECEIVES:
        side.hear("second")
        side.close_pipes()
        until(lambda: not connections() & opened, "the old pipe is closed")
    # More than the sender may send before somebody takes it.
    side.begin("second", 2000)
    errors = [outcome.error for outcome in side.finish("second")]
    side.meet("failed")
    side.move("third", 16)
    assert not connections() & opened
    side.meet("moved")
    side.end()
    return errors


def another_world(rank: int, folder: str) -> bool:
    """The gang that receives has built its world anew; whether the next transfer has opened another pipe."""
    side = Side(rank, 1, 1, folder)
    side.move("first", 40, "a world")
    opened = connections()
    side.meet("moved")
    if rank == RECEIVES:
        side.close_pipes()
    side.move("second", 40, "the next world")
    until(lambda: not connections() & opened, "the old pipe is closed")
    other = bool(connections())
    side.meet("seen")
    side.end()
    return other


def a_caller_without_a_name(rank: int, folder: str) -> bool:
    """Nothing is kept at the end that sends for a gang that does not name its world."""
    side = Side(rank, 1, 1, folder)
    side.move("only", 40, "")
    until(nothing_left, "nothing is left open")
    return True

"""What the chaos suite does to a server, one fault at a time."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from support.chaos_server import ChaosServer, arenas_of
from support.memory_group import MemoryGroup

Breaks = Literal["nothing", "world", "server"]
_FLIPPED_BYTES = 64
_ORDER_SECONDS = 30.0
_CATCH_SECONDS = 180.0
_GROUP_BYTES = 48 << 20


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault."""

    name: str
    inject: Callable[[ChaosServer, random.Random], None]
    """Returns once the harm is done."""
    breaks: Breaks = "world"
    """What has to come up again: a world takes a newer epoch, a server starts from nothing."""


def _a_rank(server: ChaosServer, rng: random.Random) -> int:
    return rng.randrange(server.settings.world_size)


def _kill(server: ChaosServer, name: str) -> None:
    # It may have died of an earlier fault's aftermath since its pid was read: then another world is due anyway.
    with contextlib.suppress(ProcessLookupError, KeyError):
        os.kill(server.pids()[name], signal.SIGKILL)


def _kill_rank(server: ChaosServer, rng: random.Random) -> None:
    _kill(server, f"rank {_a_rank(server, rng)}")


def _kill_all_ranks(server: ChaosServer, rng: random.Random) -> None:
    pids = server.pids()
    for rank in range(server.settings.world_size):
        os.kill(pids[f"rank {rank}"], signal.SIGKILL)


def _stop_rank(server: ChaosServer, rng: random.Random) -> None:
    os.kill(server.pids()[f"rank {_a_rank(server, rng)}"], signal.SIGSTOP)


def _obeyed(what: str) -> Callable[[ChaosServer, random.Random], None]:
    def inject(server: ChaosServer, rng: random.Random) -> None:
        order = server.order(_a_rank(server, rng), what)
        server.eventually(lambda: not order.exists(), f"a step in which a rank obeys ({what})", _ORDER_SECONDS, 0.005)

    return inject


def _kill_by_kernel(server: ChaosServer, rng: random.Random) -> None:
    """A rank uses more memory than its control group may, and the kernel's OOM killer ends it."""
    rank = _a_rank(server, rng)
    with MemoryGroup(_GROUP_BYTES) as group:
        group.add(server.pids()[f"rank {rank}"])
        server.order(rank, "grow")
        server.eventually(lambda: group.kills > 0, f"the kernel kills rank {rank}", _ORDER_SECONDS, 0.005)


def _corrupt_arena(server: ChaosServer, rng: random.Random) -> None:
    """A rank that dies while it writes nonsense into its weights; stopped first, so that it cannot use them."""
    rank = _a_rank(server, rng)
    pid = server.pids()[f"rank {rank}"]
    os.kill(pid, signal.SIGSTOP)
    (path,) = [path for name, path in arenas_of(pid).items() if name == f"weights arena 0 of rank {rank}"]
    descriptor = os.open(path, os.O_RDWR)
    try:
        flipped = bytes(byte ^ 0xFF for byte in os.pread(descriptor, _FLIPPED_BYTES, 0))
        os.pwrite(descriptor, flipped, 0)
    finally:
        os.close(descriptor)
    seen = server.output.count(_not_mapped(rank))
    os.kill(pid, signal.SIGKILL)
    server.eventually(
        lambda: server.output.count(_not_mapped(rank)) > seen, f"the digest catches what rank {rank}'s memory holds"
    )


def _not_mapped(rank: int) -> str:
    return f"weights arena 0 of rank {rank} is not mapped again, loading anew: tensor "


def _kill_in_a_rebuild(server: ChaosServer, rng: random.Random) -> None:
    epoch = server.epoch
    _kill_rank(server, rng)
    server.eventually(lambda: server.phase != "serving" or server.epoch > epoch, "a rebuild", every=0.002)
    _kill_rank(server, rng)


def _kill_engine_in_a_rebuild(server: ChaosServer, rng: random.Random) -> None:
    epoch = server.epoch
    _kill_rank(server, rng)
    server.eventually(lambda: server.phase != "serving" or server.epoch > epoch, "a rebuild", every=0.002)
    _kill(server, "engine")


def _kill_server(server: ChaosServer, rng: random.Random) -> None:
    server.kill()
    server.start()


def _kill_in(phase: str) -> Callable[[ChaosServer, random.Random], None]:
    """A rank is killed while a new server's world forms or loads, if it is not too quick for that."""

    def inject(server: ChaosServer, rng: random.Random) -> None:
        _kill_server(server, rng)
        name = f"rank {_a_rank(server, rng)}"
        server.eventually(lambda: name in server.pids(), f"a process for {name}", _CATCH_SECONDS, 0.005)
        server.eventually(lambda: server.phase in (phase, "serving"), phase, _CATCH_SECONDS, 0.002)
        _kill(server, name)

    return inject


KILL_RANK = Fault("SIGKILL of a rank", _kill_rank)
KILL_ALL_RANKS = Fault("SIGKILL of all ranks", _kill_all_ranks)
KILL_ENGINE = Fault("SIGKILL of the engine", lambda server, _: _kill(server, "engine"))
KILL_API = Fault("SIGKILL of the api process", lambda server, _: _kill(server, "api 0"), "nothing")
KILL_SERVER = Fault("SIGKILL of the supervisor", _kill_server, "server")
KILL_FORK_SERVER = Fault("SIGKILL of the fork server", lambda server, _: _kill(server, "fork server"), "nothing")
KILL_RENDEZVOUS = Fault("SIGKILL of the rendezvous", lambda server, _: _kill(server, "rendezvous"), "nothing")
KILL_SPARE = Fault("SIGKILL of the spare", lambda server, _: _kill(server, "spare"), "nothing")
STOP_RANK = Fault("SIGSTOP of a rank", _stop_rank)
RAISE = Fault("exception in a step", _obeyed("raise"))
OUT_OF_MEMORY = Fault("out of memory in a step", _obeyed("memory"))
KILLED_BY_KERNEL = Fault("killed by the kernel's OOM killer", _kill_by_kernel)
CRASH = Fault("SIGSEGV in a step", _obeyed("crash"))
CORRUPT = Fault("corrupted weights arena", _corrupt_arena)
KILL_IN_REBUILD = Fault("SIGKILL of a rank in a rebuild", _kill_in_a_rebuild)
KILL_ENGINE_IN_REBUILD = Fault("SIGKILL of the engine in a rebuild", _kill_engine_in_a_rebuild)
KILL_IN_INIT = Fault("SIGKILL of a rank while the world forms", _kill_in("forming"), "server")
KILL_IN_LOAD = Fault("SIGKILL of a rank while it loads", _kill_in("loading"), "server")

_WEIGHTED = (
    *[KILL_RANK] * 3,
    *[KILL_ENGINE] * 2,
    *[KILL_IN_REBUILD] * 2,
    KILL_API,
    RAISE,
    KILL_ALL_RANKS,
    STOP_RANK,
    OUT_OF_MEMORY,
    KILLED_BY_KERNEL,
    CRASH,
    CORRUPT,
    KILL_SERVER,
    KILL_IN_INIT,
    KILL_IN_LOAD,
    KILL_ENGINE_IN_REBUILD,
)


def schedule(rng: random.Random, count: int, *, respawn: str) -> list[Fault]:
    """That many faults in random order: of every kind its share, and in 20 of them every kind at least once."""
    helpers = {"cold": [KILL_RENDEZVOUS], "fork": [KILL_FORK_SERVER, KILL_RENDEZVOUS]}
    rarely = helpers.get(respawn, [KILL_SPARE, KILL_FORK_SERVER])
    faults: list[Fault] = []
    while len(faults) < count:
        batch = [*_WEIGHTED, rng.choice(rarely)]
        rng.shuffle(batch)
        faults += batch
    return faults[:count]

"""Real ranks that also do harm to themselves, on order: what a step may run into, as real as it can be had.

An order is a file `order-RANK` in $CHAOS; the rank takes it at its next step:
raise (an exception on this rank only), memory (an allocation beyond a limit of its address space), crash (SIGSEGV),
grow (memory that is used, more than there is: for a rank in a control group).

Where the file `poison` has a token id, every rank but rank 0 crashes, each time, at a plan that admits a sequence with
that token.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank import main, spare
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.settings import ServeSettings

FOLDER = "CHAOS"
_ROOM_BYTES = 64 << 20
_MUCH_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20


def order_file(folder: Path, rank: int) -> Path:
    """Where a rank looks for its order."""
    return folder / f"order-{rank}"


def poison_file(folder: Path) -> Path:
    """Where ranks look for the token that they die of."""
    return folder / "poison"


def run_rank(settings: ServeSettings, rank: int) -> None:
    """As the real one, with an eye on orders."""
    obey(rank)
    main.run_rank(settings, rank)


def run_spare(settings: ServeSettings) -> None:
    """As the real one, until it is a rank that obeys."""
    spare.run_rank = run_rank
    spare.run_spare(settings)


def obey(rank: int) -> None:
    """From now on orders are carried out before a plan is executed, when the other ranks may be in it already."""
    folder = Path(os.environ[FOLDER])
    path, poison = order_file(folder, rank), poison_file(folder)
    execute: Callable[..., None] = StepRunner.execute

    def execute_or_obey(self: StepRunner, seq: int, plan: pb.GenerateStepRequest, **options: Any) -> None:
        if path.exists():
            order = path.read_text()
            path.unlink()
            _ORDERS[order]()
        if rank and plan.admissions and poison.exists():
            token = int(poison.read_text())
            if any(token in admission.token_ids for admission in plan.admissions):
                _crash()
        execute(self, seq, plan, **options)

    StepRunner.execute = execute_or_obey


def _raise() -> None:
    raise RuntimeError("an exception inside a step, as ordered")


def _run_out_of_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM_BYTES, limits[1]))
    try:
        torch.empty(_MUCH_BYTES, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _grow() -> None:
    held = [torch.ones(_PIECE_BYTES, dtype=torch.uint8) for _ in range(_MUCH_BYTES // _PIECE_BYTES)]
    raise RuntimeError(f"nobody minds {len(held)} pieces of memory")


_ORDERS: dict[str, Callable[[], None]] = {
    "raise": _raise,
    "memory": _run_out_of_memory,
    "crash": _crash,
    "grow": _grow,
}

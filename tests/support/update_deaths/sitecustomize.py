"""Python runs this at the start of every process of a server that has its folder in PYTHONPATH.

A rank or the engine then kills processes when it comes to a point of a weight update that a test has chosen: the
server's own code has no such hook. A point is a file in the folder that UPDATE_DEATHS names; its lines are pids, or
"self", in the order in which they are killed. It counts once.

Points are "rank 1 before commit", "rank 1 after commit", "engine before commit" and so on, by worker.proto's steps.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "UPDATE_DEATHS"


def reach(point: str) -> None:
    """Kills whoever is to die here."""
    file = Path(os.environ[FOLDER]) / point
    try:
        victims = file.read_text().split()
        file.unlink()
    except FileNotFoundError:
        return
    for victim in victims:
        os.kill(os.getpid() if victim == "self" else int(victim), signal.SIGKILL)


def patch_rank(module: ModuleType) -> None:
    """Each step of a rank is a point."""
    updates: Any = module.WeightUpdates
    make, execute = updates.__init__, updates.execute

    @functools.wraps(make)
    def make_named(self: Any, *, rank: int, **arguments: Any) -> None:
        self.named_rank = rank
        make(self, rank=rank, **arguments)

    @functools.wraps(execute)
    def execute_step(self: Any, request: Any) -> Any:
        step = request.WhichOneof("step")
        reach(f"rank {self.named_rank} before {step}")
        ok = execute(self, request)
        reach(f"rank {self.named_rank} after {step}")
        return ok

    updates.__init__, updates.execute = make_named, execute_step


def patch_engine(module: ModuleType) -> None:
    """Each step that the engine asks all ranks for is one."""
    pool: Any = module.Pool
    control = pool.control

    @functools.wraps(control)
    async def control_step(self: Any, requests: Sequence[Any], *arguments: Any, **named: Any) -> Any:
        name = requests[0].WhichOneof("step") if "step" in requests[0].DESCRIPTOR.oneofs_by_name else None
        if name is not None:
            reach(f"engine before {name}")
        replies = await control(self, requests, *arguments, **named)
        if name is not None:
            reach(f"engine after {name}")
        return replies

    pool.control = control_step


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "tpmodel_worker.weights.updates": patch_rank,
    "tpmodel_worker.engine.pool": patch_engine,
}


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Patches modules when they are imported: imported from here, each process would have torch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual spec, with the patch behind the module's own code."""
        patch = PATCHES.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if patch is not None else None
        if patch is None or spec is None or spec.loader is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        loader.exec_module = execute_and_patch
        return spec


if FOLDER in os.environ:
    sys.meta_path.insert(0, PatchingFinder())

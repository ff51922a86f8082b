"""A process that was forked ahead of need: everything a rank needs is imported, and it waits to become one."""

from __future__ import annotations

import logging
import os

import torch

from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.rank.main import run_rank
from tpmodel_worker.rank.warm_up import warm_up
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.linux import set_process_name

_logger = logging.getLogger(__name__)


def run_spare(settings: ServeSettings) -> None:
    """Waits for its promotion, then serves as the rank that it was told to be; returns when the supervisor is gone."""
    device_bytes = make_contexts(settings) if settings.device == "cuda" else 0
    _logger.info("spare (pid %d) is ready, %d MiB of device memory", os.getpid(), device_bytes >> 20)
    with ArenaClient(settings.rank_socket) as supervisor:
        rank = supervisor.await_promotion(device_bytes)
    if rank is None:
        return
    set_process_name(f"tpmodel-rank{rank}")
    run_rank(settings, rank)


def make_contexts(settings: ServeSettings) -> int:
    """Makes a CUDA context on every device that a rank of this pod may have, and loads the model's kernels there.

    Returns bytes of device memory that they took: what became used on these devices meanwhile, so that whatever else
    was allocated there at the same moment is counted too (the driver tells no container its own processes' shares).
    """
    devices = range(min(len(settings.ranks_here), torch.cuda.device_count()))
    before = sum(torch.cuda.device_memory_used(device) for device in devices)
    for device in devices:
        torch.cuda.set_device(device)
        torch.empty(1, device=torch.device("cuda", device))
        warm_up(settings, torch.device("cuda", device))
    after = sum(torch.cuda.device_memory_used(device) for device in devices)
    return max(0, after - before)

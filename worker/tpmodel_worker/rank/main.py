"""A rank process, from the fork to its end."""

from __future__ import annotations

import logging
import os
import signal
import threading

import torch

from tpmodel_worker import logs
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.attempts import epoch_floor
from tpmodel_worker.rank.compilation import announce_compilations
from tpmodel_worker.rank.session import EpochGate
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.rank.worker import Worker
from tpmodel_worker.settings import ServeSettings

_LINK_LOST = 1

_logger = logging.getLogger(__name__)


def run_rank(settings: ServeSettings, rank: int) -> None:
    """Serves as one rank until the engine shuts it down or the supervisor is gone.

    The supervisor alone ends ranks: signals meant for the whole process group are ignored.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    logs.configure(f"rank {rank}", settings.log_format)
    device, sharers = _device(settings, rank)
    arenas = ArenaClient(settings.rank_socket)
    threading.Thread(target=_end_with_supervisor, args=(arenas,), name="supervisor link", daemon=True).start()
    gate = EpochGate(epoch_floor(settings.attempt))
    status = StatusBoard(rank=rank, device=str(device), threads=torch.get_num_threads())
    if device.type == "cuda":
        announce_compilations(status)
    worker = Worker(
        rank=rank,
        device=device,
        arenas=arenas,
        gate=gate,
        status=status,
        address=settings.address,
        token=settings.token,
        device_sharers=sharers,
    )

    # After the fork, and so in this function.
    from tpmodel_worker.rank.server import RankServer

    server = RankServer(
        address=settings.address, token=settings.token, worker=worker, gate=gate, status=status, arenas=arenas
    )
    port = server.start()
    arenas.hello(rank, os.getpid(), port)
    _logger.info("rank %d listens on %s:%d, device %s", rank, settings.address, port, device)
    worker.run()
    server.stop()


def _device(settings: ServeSettings, rank: int) -> tuple[torch.device, int]:
    """The rank's device, and how many ranks of the pod have the same CUDA device."""
    if settings.device == "cpu":
        return torch.device("cpu"), 1
    devices = torch.cuda.device_count()
    if devices == 0:
        raise SystemExit(f"rank {rank}: device cuda was asked for, but torch finds no CUDA device")
    local = rank - settings.ranks_here.start
    device = torch.device("cuda", local % devices)
    torch.cuda.set_device(device)
    return device, len(range(local % devices, len(settings.ranks_here), devices))


def _end_with_supervisor(arenas: ArenaClient) -> None:
    """Ends the process, whatever its other threads are stuck in, when the supervisor's end of the link closes."""
    arenas.wait_until_closed()
    _logger.error("the supervisor is gone")
    os._exit(_LINK_LOST)

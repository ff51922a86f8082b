"""The process that holds the store through which ranks meet before an epoch's world is built.

Nothing needs it once a world is built. It lives as long as the supervisor's end of the rank socket.
"""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

from tpmodel_worker import logs
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK
from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.settings import ServeSettings

_BACKLOG = 1024
_STORE_TIMEOUT = timedelta(seconds=60)

logger = logging.getLogger(__name__)


def start_store(address: str, port: int = 0) -> TCPStore:
    """A store server that listens on one address only; port 0: one that the kernel chose.

    Raises:
        CommunicatorError: the address can't be listened on.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # A port that was asked for may have connections of an earlier store that linger.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
        # The store takes the descriptor over.
        return TCPStore(
            address,
            listener.getsockname()[1],
            is_master=True,
            timeout=_STORE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=os.dup(listener.fileno()),
        )
    except (OSError, DistError) as error:
        raise CommunicatorError(f"no rendezvous store on {address}: {error}") from error
    finally:
        listener.close()


def run_rendezvous(settings: ServeSettings) -> None:
    """Serves the store, tells the supervisor its port, and returns when the supervisor is gone."""
    logs.configure("rendezvous", settings.log_format)
    store = start_store(settings.address)
    with ArenaClient(settings.rank_socket) as supervisor:
        supervisor.hello(RENDEZVOUS_RANK, os.getpid(), store.port)
        logger.info("the rendezvous store listens on %s:%d", settings.address, store.port)
        supervisor.wait_until_closed()
    logger.info("the supervisor is gone")

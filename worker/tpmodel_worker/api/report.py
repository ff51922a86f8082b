"""Tells the supervisor that this process listens."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tpmodel.v1 import pod_pb2
from tpmodel_worker import framing

logger = logging.getLogger(__name__)

_RECONNECT_SECONDS = 0.2


async def report_listening(path: Path, name: str) -> None:
    """Connects to settings.report_socket, says that `name` listens, and does so again if the connection breaks.

    Runs until cancelled.
    """
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(str(path))
        except OSError:
            await asyncio.sleep(_RECONNECT_SECONDS)
            continue
        try:
            writer.write(framing.frame(pod_pb2.ProcessReport(name=name, listening=True)))
            await writer.drain()
            # The supervisor has nothing to say to an api process: this returns when it closes.
            await reader.read()
        except ConnectionError as error:
            logger.warning("the connection to the supervisor broke: %s", error)
        finally:
            writer.close()
        await asyncio.sleep(_RECONNECT_SECONDS)

"""Entry point of the engine process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path

from tpmodel_worker import logs
from tpmodel_worker.engine.service import Engine
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the engine until SIGTERM; the process's exit code.

    The world's end is not the engine's: it reports PHASE_FAILED or PHASE_DRAINED, and the supervisor acts.
    """
    parser = argparse.ArgumentParser(prog="tpmodel_worker.engine", description=__doc__)
    parser.add_argument("--settings-file", type=Path, required=True, help="ServeSettings as JSON")
    settings = ServeSettings.from_json(parser.parse_args(arguments).settings_file.read_text(encoding="utf-8"))
    logs.configure("engine", settings.log_format)
    asyncio.run(run(settings))
    return 0


async def run(settings: ServeSettings) -> None:
    """Runs one engine until SIGTERM."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    # A terminal's Ctrl-C reaches the whole foreground group: what it means is for the supervisor to say.
    loop.add_signal_handler(signal.SIGINT, lambda: logger.debug("SIGINT is the supervisor's to handle"))
    engine = Engine(settings)
    try:
        await engine.start()
        logger.info("engine %s listens on port %d for supervisors", engine.instance_id, engine.control_port)
        await engine.wait(stopped)
    finally:
        await engine.stop()

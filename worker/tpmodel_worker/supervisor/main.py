"""The main process of a pod.

Exit codes: those of exit_codes.py. The first SIGTERM, SIGINT or SIGHUP drains: running requests are finished, within
settings.drain_timeout. A SIGINT after that (a second Ctrl-C) ends everything at once, with 130.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from tpmodel_worker import logs
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor import linux
from tpmodel_worker.supervisor.checkpoint import obtain_checkpoint
from tpmodel_worker.supervisor.configuration import (
    SERVE_FLAGS,
    ConfigurationError,
    Flags,
    check_model,
    check_options,
)
from tpmodel_worker.supervisor.download_state import DownloadFailedError
from tpmodel_worker.supervisor.entries import EntryPoints
from tpmodel_worker.supervisor.events import Ended, EventListener
from tpmodel_worker.supervisor.leader import LeaderPod
from tpmodel_worker.supervisor.lifecycle import Ending
from tpmodel_worker.supervisor.persist_folder import check_persist_folder
from tpmodel_worker.supervisor.pod import Pod
from tpmodel_worker.supervisor.ports import PortError, reserved_ports
from tpmodel_worker.supervisor.runtime import RuntimeFolderError, runtime_folder
from tpmodel_worker.supervisor.status import HealthPort
from tpmodel_worker.supervisor.terminal import Terminal
from tpmodel_worker.supervisor.worker_pod import WorkerPod

_log = logging.getLogger(__name__)

TERMINATION_LOG = Path("/dev/termination-log")
"""Kubernetes makes this file and shows what is written there."""
_LONGEST_MESSAGE = 4096
"""Bytes; Kubernetes keeps no more."""


async def run_supervisor(
    settings: ServeSettings,
    *,
    on_event: EventListener,
    entries: EntryPoints | None = None,
    flags: Flags = SERVE_FLAGS,
    termination_log: Path = TERMINATION_LOG,
) -> ExitCode:
    """Runs a pod until it is told to end or has to; afterwards none of its processes lives.

    Must run on the process's main thread: the kernel ties the other processes to the thread that starts them.

    Args:
        settings: as the command line gave them; ports may be 0.
        on_event: told what happens.
        entries: what the processes run; None: the real ones.
        flags: how the command line calls the settings.
        termination_log: where the cause is written, when the file exists.
    """
    linux.become_subreaper()
    try:
        settings = check_options(settings, flags)
        with reserved_ports(settings) as settings, runtime_folder(settings) as settings:
            ending = await _Life(settings, entries or EntryPoints(), flags, on_event).run()
    except (ConfigurationError, PortError, RuntimeFolderError) as error:
        ending = Ending(ExitCode.CONFIGURATION, str(error))
    on_event(Ended(ending))
    if ending.code is not ExitCode.DRAINED:
        write_termination_message(termination_log, ending.cause)
    return ending.code


def serve(settings: ServeSettings, *, entries: EntryPoints | None = None) -> int:
    """Runs a pod in the foreground, showing on the terminal what happens; returns the exit code."""
    logs.configure("supervisor", settings.log_format)
    terminal = Terminal(settings.log_format)
    return int(asyncio.run(run_supervisor(settings, on_event=terminal.on_event, entries=entries)))


class _Life:
    """The checkpoint's way into the pod, then the pod; and what signals mean meanwhile."""

    def __init__(self, settings: ServeSettings, entries: EntryPoints, flags: Flags, on_event: EventListener) -> None:
        self._settings = settings
        self._entries = entries
        self._flags = flags
        self._on_event = on_event
        self._pod: Pod | None = None
        self._asked: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    async def run(self) -> Ending:
        """Lives; returns why it ended. Raises ConfigurationError."""
        # Probes are answered from the start: a download may take an hour.
        health = HealthPort(self._settings)
        await health.start()
        try:
            with self._signals():
                settings = await self._obtain(health)
                if settings is None:
                    return self._asked.result()
                made = LeaderPod if settings.leads else WorkerPod
                self._pod = made(settings, self._entries, self._on_event, health)
                return await self._pod.run()
        except DownloadFailedError as error:
            return Ending(ExitCode.RESTART_GANG, str(error))
        finally:
            await health.stop()

    async def _obtain(self, health: HealthPort) -> ServeSettings | None:
        """The settings with the checkpoint's folder and what it decides; None: asked to end before that."""
        fetching = asyncio.create_task(obtain_checkpoint(self._settings, health, self._on_event))
        await asyncio.wait({fetching, self._asked}, return_when=asyncio.FIRST_COMPLETED)
        if not fetching.done():
            fetching.cancel()
            await asyncio.wait({fetching})
            return None
        settings = check_model(fetching.result(), self._flags)
        check_persist_folder(settings, self._flags)
        return settings

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: lambda: self._drain("SIGTERM"),
            signal.SIGINT: self._interrupt,
            signal.SIGCHLD: lambda: self._pod.reap_orphans() if self._pod is not None else None,
        }
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            handlers[signal.SIGHUP] = lambda: self._drain("SIGHUP")
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _drain(self, reason: str) -> None:
        if self._pod is not None:
            self._pod.drain(reason)
        elif not self._asked.done():
            self._asked.set_result(Ending(ExitCode.DRAINED, f"drained: {reason}"))

    def _interrupt(self) -> None:
        if self._pod is not None and self._pod.draining:
            self._pod.interrupt()
        else:
            self._drain("SIGINT")


def write_termination_message(path: Path, cause: str) -> None:
    """Leaves the cause for Kubernetes, which shows it in the container's status; nothing where there is no file."""
    if path.exists() and os.access(path, os.W_OK):
        text = cause.encode()[:_LONGEST_MESSAGE].decode(errors="ignore")
        try:
            path.write_text(text)
        except OSError as error:
            _log.warning("%s: %s", path, error)

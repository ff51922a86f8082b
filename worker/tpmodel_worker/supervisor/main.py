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
from tpmodel_worker.supervisor.configuration import ConfigurationError, check_settings
from tpmodel_worker.supervisor.entries import EntryPoints
from tpmodel_worker.supervisor.events import Ended, EventListener
from tpmodel_worker.supervisor.lifecycle import Ending
from tpmodel_worker.supervisor.pod import Pod
from tpmodel_worker.supervisor.ports import PortError, reserved_ports
from tpmodel_worker.supervisor.runtime import RuntimeFolderError, runtime_folder, write_settings_file
from tpmodel_worker.supervisor.terminal import Terminal

_log = logging.getLogger(__name__)

TERMINATION_LOG = Path("/dev/termination-log")
"""Kubernetes makes this file and shows what is written there."""


async def run_supervisor(
    settings: ServeSettings,
    *,
    on_event: EventListener,
    entries: EntryPoints | None = None,
    termination_log: Path = TERMINATION_LOG,
) -> ExitCode:
    """Runs a pod until it is told to end or has to; afterwards none of its processes lives.

    Must run on the process's main thread: the kernel ties the other processes to the thread that starts them.

    Args:
        settings: as the command line gave them; ports may be 0.
        on_event: told what happens.
        entries: what the processes run; None: the real ones.
        termination_log: where the cause is written, when the file exists.
    """
    linux.become_subreaper()
    try:
        settings = check_settings(settings)
        with reserved_ports(settings) as settings, runtime_folder(settings) as settings:
            pod = Pod(settings, write_settings_file(settings), entries or EntryPoints(), on_event)
            with _signals(pod):
                ending = await pod.run()
    except (ConfigurationError, PortError, RuntimeFolderError) as error:
        ending = Ending(ExitCode.CONFIGURATION, str(error))
    on_event(Ended(ending))
    if ending.code is not ExitCode.DRAINED:
        _write_termination_message(termination_log, ending.cause)
    return ending.code


def serve(settings: ServeSettings, *, entries: EntryPoints | None = None) -> int:
    """Runs a pod in the foreground, showing on the terminal what happens; returns the exit code."""
    logs.configure("supervisor", settings.log_format)
    terminal = Terminal(settings.log_format)
    return int(asyncio.run(run_supervisor(settings, on_event=terminal.on_event, entries=entries)))


@contextlib.contextmanager
def _signals(pod: Pod) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if pod.draining:
            pod.interrupt()
        else:
            pod.drain("SIGINT")

    handlers: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: lambda: pod.drain("SIGTERM"),
        signal.SIGINT: interrupt,
        signal.SIGCHLD: pod.reap_orphans,
    }
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        handlers[signal.SIGHUP] = lambda: pod.drain("SIGHUP")
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def _write_termination_message(path: Path, cause: str) -> None:
    if path.exists() and os.access(path, os.W_OK):
        try:
            path.write_text(cause)
        except OSError as error:
            _log.warning("%s: %s", path, error)

"""What a person sees of a supervisor: output of its processes, load progress, the line that says it is ready.

The ready line goes to standard output, everything else to standard error. Its format is stable, programs read it:

    tpmodel: ready: grpc HOST:PORT http http://HOST:PORT model NAME tp N (SECONDS s)
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Literal, Never, TextIO

from tqdm import tqdm

from tpmodel.v1 import worker_pb2
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.events import (
    Downloading,
    Draining,
    Ended,
    EngineStateChanged,
    Joined,
    Output,
    Ready,
    SupervisorEvent,
)
from tpmodel_worker.supervisor.output import label

_LINE_SECONDS = 5.0


def ready_line(settings: ServeSettings, seconds: float) -> str:
    """The line, without its end."""
    grpc_address = join_host_port(settings.host, settings.port)
    http_address = join_host_port(settings.host, settings.http_port)
    return (
        f"tpmodel: ready: grpc {grpc_address} http http://{http_address} "
        f"model {settings.served_name} tp {settings.world_size} ({seconds:.1f} s)"
    )


class Terminal:
    """Prints events: with a progress bar on a terminal, with a line now and then elsewhere."""

    def __init__(self, log_format: Literal["auto", "json", "text"]) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._format: Literal["json", "text"] = (
            log_format if log_format != "auto" else "text" if self._is_terminal else "json"
        )
        self._bar: tqdm[Never] | None = None
        self._next_line = 0.0

    def on_event(self, event: SupervisorEvent) -> None:
        """Shows one event."""
        match event:
            case Output(process, line):
                self._print(label(process, line, self._format))
            case EngineStateChanged(state):
                self._show_progress(state)
            case Ready(settings, seconds):
                self._close_bar()
                with _reader_may_be_gone(sys.stdout):
                    sys.stdout.write(ready_line(settings, seconds) + "\n")
                    sys.stdout.flush()
            case Joined(settings, leader, seconds):
                ranks = ", ".join(str(rank) for rank in settings.ranks_here)
                self._say(f"joined the gang: rank {ranks} of {settings.world_size}, leader {leader} ({seconds:.1f} s)")
            case Downloading(download):
                self._show_bytes("downloading", download.done_bytes, download.total_bytes, download.waiting_for)
            case Draining(reason):
                self._close_bar()
                self._say(f"{reason}: finishing running requests")
            case Ended(ending):
                self._close_bar()
                self._say(f"ended: {ending.cause}")

    def _show_progress(self, state: worker_pb2.EngineState) -> None:
        if state.phase == worker_pb2.PHASE_LOADING and state.load_total_bytes:
            self._show_bytes("loading", state.load_done_bytes, state.load_total_bytes)
        else:
            self._close_bar()

    def _show_bytes(self, what: str, done: int, total: int, waiting_for: str = "") -> None:
        if self._is_terminal:
            if self._bar is None:
                self._bar = tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False)
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            waits = f", waiting for {waiting_for}" if waiting_for else ""
            self._say(f"{what}: {done} of {total} bytes ({100.0 * done / max(total, 1):.0f}%){waits}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, message: str) -> None:
        line = f"tpmodel: {message}"
        self._print(line if self._format == "text" else label("supervisor", line, self._format))

    def _print(self, line: str) -> None:
        with _reader_may_be_gone(sys.stderr):
            # Through the bar, which would otherwise be torn apart.
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()


@contextlib.contextmanager
def _reader_may_be_gone(stream: TextIO) -> Iterator[None]:
    """Serving goes on when nobody reads a stream any more; what is printed from then on goes nowhere."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

"""Pipes that outlive the transfer for which they were opened: opening one takes NCCL most of a second."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tpmodel_worker.kv.errors import KvPipeError

IDLE_SECONDS = 60.0
_LOOK_SECONDS = 2.0

_logger = logging.getLogger(__name__)


class OpenPipe(Protocol):
    """What is asked of a pipe here."""

    @property
    def broken(self) -> bool:
        """It carries nothing any more."""
        ...

    def abort(self, reason: str) -> None:
        """Breaks it off."""
        ...

    def close(self) -> None:
        """Gives everything back. Raises KvPipeError."""
        ...


Pipe = TypeVar("Pipe", bound=OpenPipe)


@dataclass(frozen=True, slots=True, eq=False)
class Lasting(Generic[Pipe]):
    """One end of a pipe."""

    name: str
    """The same at both ends."""
    peer: str
    """What it is looked for by: for the end that sends, the rank that it leads to; for the other one, its name."""
    pipe: Pipe
    closes: bool
    """This end closes it when it was idle for long. The other one does not: it could be just about to be used."""


class PipePool(Generic[Pipe]):
    """Those that no transfer uses. From any thread; a thread of its own closes pipes, as long as there are any."""

    def __init__(self, *, idle_seconds: float = IDLE_SECONDS, look_seconds: float = _LOOK_SECONDS) -> None:
        """idle_seconds: how long a pipe may wait for its next use; look_seconds: how often that is looked at."""
        self._idle_seconds = idle_seconds
        self._look_seconds = look_seconds
        self._changed = threading.Condition()
        self._idle: list[tuple[float, Lasting[Pipe]]] = []
        self._ended: list[tuple[str, Lasting[Pipe]]] = []
        """To be closed, and why; "": in order."""
        self._lent: list[Lasting[Pipe]] = []
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, peer: str, wait_seconds: float = 0.0) -> Lasting[Pipe] | None:
        """The one that was used last; whoever takes it puts it back or ends it.

        wait_seconds: how long to wait for one that is in use: the other end may have done with it just before this one.
        None: there is none that is whole, or it was in use all the time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._find(peer) is not None or not self._is_lent(peer), wait_seconds)
            entry = self._find(peer)
            if entry is None:
                return None
            self._idle.remove(entry)
            self._lent.append(entry[1])
            return entry[1]

    def lend(self, lasting: Lasting[Pipe]) -> None:
        """A new one, in use."""
        with self._changed:
            self._lent.append(lasting)

    def put(self, lasting: Lasting[Pipe]) -> None:
        """Everything that was sent over it has arrived."""
        with self._changed:
            self._lent.remove(lasting)
            self._idle.append((time.monotonic(), lasting))
            self._look_after()

    def end(self, lasting: Lasting[Pipe], reason: str = "") -> None:
        """Closes it in the background; with a reason what is on its way is broken off before."""
        if reason:
            lasting.pipe.abort(reason)
        with self._changed:
            self._lent.remove(lasting)
            self._ended.append((reason, lasting))
            self._look_after()

    def drain(self, reason: str) -> None:
        """Ends all that are idle; returns at once."""
        with self._changed:
            self._ended += [(reason, lasting) for _, lasting in self._idle]
            self._idle.clear()
            self._look_after()

    def join(self, seconds: float) -> None:
        """Waits for the end of what drain and end have begun, for that long at most."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _find(self, peer: str) -> tuple[float, Lasting[Pipe]] | None:
        whole = (entry for entry in reversed(self._idle) if entry[1].peer == peer and not entry[1].pipe.broken)
        return next(whole, None)

    def _is_lent(self, peer: str) -> bool:
        return any(lasting.peer == peer for lasting in self._lent)

    def _look_after(self) -> None:
        if self._thread is None and (self._idle or self._ended):
            self._thread = threading.Thread(target=self._run, name="kv pipes", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or not self._idle, self._look_seconds)
                self._sort_out(time.monotonic())
                ended, self._ended = self._ended, []
                if not ended and not self._idle:
                    self._thread = None
                    return
            for reason, lasting in ended:
                _close(lasting, reason)

    def _sort_out(self, now: float) -> None:
        kept: list[tuple[float, Lasting[Pipe]]] = []
        for since, lasting in self._idle:
            if lasting.pipe.broken:
                self._ended.append(("the other end is gone", lasting))
            elif lasting.closes and now - since >= self._idle_seconds:
                self._ended.append(("", lasting))
            else:
                kept.append((since, lasting))
        self._idle = kept


def _close(lasting: Lasting[Pipe], reason: str) -> None:
    if reason:
        lasting.pipe.abort(reason)
    try:
        lasting.pipe.close()
    except KvPipeError as error:
        _logger.debug("pipe %s: %s", lasting.name, error)
    except Exception:  # The boundary of the thread, which others' pipes need.
        _logger.exception("pipe %s can't be closed", lasting.name)

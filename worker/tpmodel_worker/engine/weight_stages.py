"""Which call of a live weight update is due, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator

import grpc

from tpmodel_worker.engine.weight_errors import UpdateError

_TURN_SECONDS = 3.0
"""How long a call waits for the one before it, which may be just about to end."""


class Stage(enum.Enum):
    """How far an update is."""

    IDLE = "idle"
    JOINED = "initialised"
    AWAITING = "waiting for the trainer's first index"
    STARTED = "started"


class Turns:
    """Calls are taken one by one."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @property
    def taken(self) -> bool:
        """Whether a call is under way."""
        return self._lock.locked()

    @contextlib.asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """For a call of the trainer's. Raises UpdateError where another one goes on and on."""
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._lock.acquire()
        except TimeoutError as error:
            message = "another call of this update is under way"
            raise UpdateError(grpc.StatusCode.FAILED_PRECONDITION, message) from error
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.asynccontextmanager
    async def between_calls(self) -> AsyncIterator[None]:
        """For what the engine itself does, which waits as long as it takes."""
        async with self._lock:
            yield


def check_due(stage: Stage, due: tuple[Stage, ...]) -> None:
    """Raises UpdateError where the call is not due."""
    if stage not in due:
        names = " or ".join(one.value for one in due)
        message = f"the update is {stage.value}: this call is due when it is {names}"
        raise UpdateError(grpc.StatusCode.FAILED_PRECONDITION, message)


def check_session(session: str, present: str) -> None:
    """Raises UpdateError for a call of another trainer than the one that has joined last.

    present: its session; "": nobody has joined, which check_due finds where it matters.
    """
    if session == present or not present:
        return
    if not session:
        message = "session is empty: InitUpdate answers with the one that the calls behind it have to carry"
        raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, message)
    message = "another trainer has taken this gang over: join again to take it back"
    raise UpdateError(grpc.StatusCode.FAILED_PRECONDITION, message)

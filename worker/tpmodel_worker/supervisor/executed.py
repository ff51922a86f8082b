"""Keeps the processes alive that are programs of their own: engine, api processes and the fork server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.supervisor.fork_client import NAME as FORK_SERVER
from tpmodel_worker.supervisor.fork_client import ForkServer, ForkServerError
from tpmodel_worker.supervisor.lifecycle import Ending, RestartPolicy, judge_repeated
from tpmodel_worker.supervisor.processes import Process, ProcessExit

_log = logging.getLogger(__name__)


class Keeper:
    """Starts a program, and again when it has ended, with pauses."""

    def __init__(
        self,
        start: Callable[[], Awaitable[Process]],
        *,
        judge: Callable[[ProcessExit], Awaitable[Ending | None]],
        end_pod: Callable[[Ending], None],
        gives_up: Callable[[], bool] = lambda: True,
    ) -> None:
        """Args:
        start: starts the process.
        judge: whether its end ends the pod.
        end_pod: called when it does.
        gives_up: whether ending too often ends the pod now.
        """
        self._start = start
        self._judge = judge
        self._end_pod = end_pod
        self._gives_up = gives_up
        self._policy = RestartPolicy()
        self._restarts = True

    def stop_restarting(self) -> None:
        """From now on the process is not started again: the pod drains."""
        self._restarts = False

    def forget(self) -> None:
        """The ends so far count for nothing; called by a judge, that of the present process neither."""
        self._policy = RestartPolicy()

    async def keep(self) -> None:
        """Keeps the process alive, until its end ends the pod or the pod drains."""
        while True:
            process = await self._start()
            ended = await process.ended()
            pause = self._policy.pause(time.monotonic())
            ending = await self._judge(ended)
            if ending is None and self._gives_up():
                ending = judge_repeated(ended, self._policy)
            if ending is not None:
                self._end_pod(ending)
                return
            if not self._restarts:
                return
            _log.warning("%s; starting it again in %.1f s", ended.describe(), pause)
            await asyncio.sleep(pause)


async def keep_fork_server(server: ForkServer, end_pod: Callable[[Ending], None]) -> None:
    """Keeps the fork server alive; its end touches no process that it forked."""
    policy = RestartPolicy()
    while True:
        try:
            ended = await server.ended(await server.start())
            reason = ended.describe()
        except ForkServerError as error:
            reason = str(error)
        pause = policy.pause(time.monotonic())
        if policy.exhausted:
            cause = f"the {FORK_SERVER} ended {policy.limit} times within {policy.window_seconds:.0f} s: {reason}"
            end_pod(Ending(ExitCode.RESTART_GANG, cause))
            return
        _log.warning("%s; starting it again in %.1f s", reason, pause)
        await asyncio.sleep(pause)

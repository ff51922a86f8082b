"""The supervisor's side of the fork server: starts it, asks it for processes, starts it again when it has died."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from tpmodel.v1 import pod_pb2
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.channel import DescriptorChannel
from tpmodel_worker.supervisor.processes import Process, ProcessExit, ProcessStartError, ProcessTable

NAME = "fork server"
# Importing torch from a slow network disk.
_START_SECONDS = 180.0
_FORK_SECONDS = 30.0


class ForkServerError(ProcessStartError):
    """The fork server could not be started, or could not fork."""


class ForkServer:
    """Forks processes for the supervisor, one at a time."""

    def __init__(
        self,
        table: ProcessTable,
        settings: ServeSettings,
        *,
        entries: Mapping[str, str],
        preload: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        """entries: "module:function" by role. preload: modules imported before the first fork. environment: of the
        fork server and all that it forks."""
        self._table = table
        self._settings = settings
        self._arguments = [f"--entry={role}={entry}" for role, entry in entries.items()]
        self._preload = list(preload)
        self._environment = dict(environment)
        self._channel: DescriptorChannel | None = None
        self._lock = asyncio.Lock()
        self._ready = asyncio.Event()
        self._ids = itertools.count(1)

    async def start(self) -> Process:
        """Starts the process and returns when it can fork.

        Raises:
            ForkServerError: it ended, or was not ready in time.
        """
        async with self._lock:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                command = [sys.executable, "-m", "tpmodel_worker.supervisor.fork_server"]
                command += [f"--socket-fd={theirs.fileno()}", f"--supervisor={os.getpid()}", *self._arguments]
                process = await self._table.execute(
                    NAME,
                    [*command, "--preload", *self._preload],
                    environment=self._environment,
                    pass_fds=[theirs.fileno()],
                    shim=False,
                )
            channel = DescriptorChannel(ours)
            try:
                await self._answer(channel, 0, _START_SECONDS)
            except ForkServerError:
                channel.close()
                await self._table.kill([process])
                raise
            self._channel = channel
            self._table.mark_running(process, 0)
            self._ready.set()
            return process

    async def ended(self, process: Process) -> ProcessExit:
        """Waits for the process's end; afterwards forks wait until start was called again."""
        ending = await process.ended()
        self._ready.clear()
        async with self._lock:
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            # What it forked without being able to say so belongs to nobody.
            await self._table.kill_orphans()
        return ending

    async def new_process(self, role: str, name: str, *, rank: int = 0) -> Process:
        """Forks a process; waits for the fork server where it is being started.

        Args:
            role: which entry the process runs.
            name: what it is called in output and status.
            rank: for ranks, which one.

        Raises:
            ForkServerError: the fork failed, or the fork server died meanwhile.
        """
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._ready.wait()
        except TimeoutError as error:
            raise ForkServerError(f"no fork server for {_START_SECONDS:.0f} s") from error
        async with self._lock:
            if self._channel is None:
                raise ForkServerError("the fork server has died")
            request = pod_pb2.ForkRequest(
                id=next(self._ids), role=role, rank=rank, settings_json=self._settings.to_json()
            )
            with self._table.adoption():
                pid, stdout, stderr = await self._request(self._channel, request)
                return await self._table.adopt(name, pid, stdout, stderr)

    def close(self) -> None:
        """Closes the connection: the fork server ends, what it forked lives on. Idempotent."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def _request(self, channel: DescriptorChannel, request: pod_pb2.ForkRequest) -> tuple[int, int, int]:
        """The new process's pid and the reading ends of its output."""
        stdout, child_stdout = os.pipe()
        stderr, child_stderr = os.pipe()
        try:
            try:
                with contextlib.suppress(ConnectionError):  # the answer's absence will say it
                    await channel.send(request, [child_stdout, child_stderr])
            finally:
                os.close(child_stdout)
                os.close(child_stderr)
            return await self._answer(channel, request.id, _FORK_SECONDS), stdout, stderr
        except BaseException:
            os.close(stdout)
            os.close(stderr)
            raise

    async def _answer(self, channel: DescriptorChannel, request_id: int, seconds: float) -> int:
        try:
            async with asyncio.timeout(seconds):
                received = await channel.receive(pod_pb2.ForkResponse)
        except TimeoutError as error:
            self.close()  # the answers no longer follow the requests: it ends, and is started again
            raise ForkServerError(f"the fork server gave no answer for {seconds:.0f} s") from error
        except ConnectionError as error:
            raise ForkServerError("the fork server has died") from error
        if received is None:
            raise ForkServerError("the fork server has died")
        response, _ = received
        if response.id != request_id:
            self.close()
            raise ForkServerError(f"the fork server answered request {response.id} instead of {request_id}")
        if response.error:
            raise ForkServerError(response.error)
        return response.pid

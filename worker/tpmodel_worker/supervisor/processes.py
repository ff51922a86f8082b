"""The pod's processes: started or adopted, watched through pidfds, and ended, each within a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tpmodel_worker.supervisor import linux
from tpmodel_worker.supervisor.output import LinePrinter, OutputReader

_log = logging.getLogger(__name__)

# How long the exit of a process waits for the end of its output: a child of its own may hold the pipes open.
_OUTPUT_SECONDS = 0.5
# SIGKILL takes a while for a process with a large CUDA context.
_KILL_SECONDS = 10.0
_ORPHAN_POLL_SECONDS = 0.02


class ProcessStartError(Exception):
    """A process could not be started."""


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended: with a code or by a signal."""

    name: str
    pid: int
    code: int | None
    signal: int | None
    last_stderr_lines: tuple[str, ...] = ()

    def describe(self) -> str:
        """For example: rank 1 (pid 4711) was killed by SIGKILL."""
        if self.signal is None:
            return f"{self.name} (pid {self.pid}) ended with code {self.code}"
        known = self.signal in signal.Signals.__members__.values()
        name = signal.Signals(self.signal).name if known else f"signal {self.signal}"
        return f"{self.name} (pid {self.pid}) was killed by {name}"


class Process:
    """A child of the supervisor, until it is reaped and after."""

    def __init__(self, name: str, pid: int, outputs: Sequence[OutputReader], reap: Callable[[], int]) -> None:
        """outputs: readers of its standard output and error. reap: waits and returns what Popen.wait would."""
        self.name = name
        self.pid = pid
        self.port = 0
        """Where it listens, once it said so."""
        self.state: Literal["starting", "running", "exited"] = "starting"
        self.restarts = 0
        self.device_bytes = 0
        """Device memory that it holds in advance, for a spare."""
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[ProcessExit] = loop.create_future()
        """Done once the process is reaped and its output is read."""
        self._outputs = outputs
        self._reap = reap
        self._pidfd = os.pidfd_open(pid)
        self._finishing: asyncio.Task[None] | None = None
        loop.add_reader(self._pidfd, self._on_exit)

    @property
    def alive(self) -> bool:
        """Whether the process has not been reaped yet."""
        return self.state != "exited"

    def send_signal(self, number: signal.Signals) -> None:
        """Signals the process; never another one that got its pid."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def rename(self, name: str) -> None:
        """What it is called from now on, in its output too."""
        self.name = name
        for reader in self._outputs:
            reader.process = name

    async def ended(self) -> ProcessExit:
        """Waits for its end."""
        # Shielded: who stops waiting must not cancel the future of all.
        return await asyncio.shield(self.exited)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        code = self._reap()
        self.state = "exited"
        os.close(self._pidfd)
        self._finishing = asyncio.create_task(self._finish(code))

    async def _finish(self, code: int) -> None:
        if self._outputs:
            await asyncio.wait([reader.ended for reader in self._outputs], timeout=_OUTPUT_SECONDS)
        for reader in self._outputs:
            reader.close()
        lines = tuple(self._outputs[-1].last_lines) if self._outputs else ()
        exit_code, number = (code, None) if code >= 0 else (None, -code)
        self.exited.set_result(ProcessExit(self.name, self.pid, exit_code, number, lines))


Listener = Callable[[Process], None]
"""Called when a process has started, when it serves, and when it has ended."""


class ProcessTable:
    """All processes of the pod by name, and the only place that starts, signals and reaps them."""

    def __init__(self, print_line: LinePrinter) -> None:
        self._print_line = print_line
        self._processes: dict[str, Process] = {}
        self._listeners: list[Listener] = []
        self._starting: set[int] = set()
        self._adoptions = 0

    @property
    def processes(self) -> list[Process]:
        """The newest process of every name, live or not."""
        return list(self._processes.values())

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Calls the listener whenever a process changes its state; returns what stops that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def execute(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        shim: bool = True,
    ) -> Process:
        """Starts a program, in a process group of its own: Ctrl-C in the terminal is for the supervisor alone.

        Args:
            name: what the process is called in output and status.
            command: program and arguments.
            environment: variables on top of the supervisor's own.
            pass_fds: descriptors that the program inherits under their numbers.
            shim: start it through exec_child, which binds its life to the supervisor's; False where the program
                does that itself.
        """
        prefix = [sys.executable, "-m", "tpmodel_worker.supervisor.exec_child", str(os.getpid())] if shim else []
        started = subprocess.Popen(  # noqa: ASYNC220 - returns once the child has called exec
            [*prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | dict(environment or {}),
            pass_fds=pass_fds,
            process_group=0,
        )
        assert started.stdout is not None
        assert started.stderr is not None
        # The readers own the pipes from here on, so they get descriptors of their own.
        descriptors = [os.dup(started.stdout.fileno()), os.dup(started.stderr.fileno())]
        started.stdout.close()
        started.stderr.close()
        return await self._add(name, started.pid, descriptors, started.wait)

    async def adopt(self, name: str, pid: int, stdout: int, stderr: int) -> Process:
        """Takes over a process that was forked for the supervisor, and the reading ends of its output."""
        return await self._add(name, pid, [stdout, stderr], lambda: _wait_for(pid))

    def mark_running(self, process: Process, port: int) -> None:
        """Notes that a process serves, on the given port."""
        process.port = port
        if process.state == "starting":
            process.state = "running"
            self._notify(process)

    def mark_ready(self, process: Process, device_bytes: int) -> None:
        """Notes that a spare could be promoted, and what device memory it holds for that."""
        process.device_bytes = device_bytes
        process.state = "running"
        self._notify(process)

    def promote(self, process: Process, name: str) -> None:
        """A spare becomes the named process: it starts anew, in the place of an earlier one of that name."""
        del self._processes[process.name]
        process.rename(name)
        process.state, process.device_bytes = "starting", 0
        self._replace(process)
        self._notify(process)

    async def end(self, processes: Iterable[Process], grace_seconds: float) -> None:
        """Asks the processes to end (SIGTERM), and makes them when they have not in time (SIGKILL). Idempotent."""
        live = [process for process in processes if process.alive]
        for process in live:
            process.send_signal(signal.SIGTERM)
        await _wait_all(live, grace_seconds)
        await self.kill(live)

    async def kill(self, processes: Iterable[Process]) -> None:
        """SIGKILLs the processes and waits until they are gone."""
        live = [process for process in processes if process.alive]
        for process in live:
            process.send_signal(signal.SIGKILL)
        await _wait_all(live, _KILL_SECONDS)
        for process in live:
            if process.alive:
                _log.error("%s (pid %d) does not end: the kernel holds it", process.name, process.pid)

    async def kill_everything(self) -> None:
        """SIGKILLs all of the table's processes, then whatever orphans of theirs the supervisor inherited."""
        await self.kill(self.processes)
        await self.kill_orphans()

    async def kill_orphans(self) -> None:
        """SIGKILLs and reaps children of the supervisor that are not in the table, and their children in turn."""
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline:
            orphans = set(linux.children(os.getpid())) - self._known_pids()
            if not orphans:
                return
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap_orphans()
            await asyncio.sleep(_ORPHAN_POLL_SECONDS)

    def reap_orphans(self) -> None:
        """Reaps ended children that are not in the table: a subreaper inherits the orphans of its descendants."""
        while self._adoptions == 0:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            # The kernel names any of the ended; those of the table are reaped in their turn, with this called after.
            if ended is None or ended.si_pid in self._known_pids():
                return
            os.waitpid(ended.si_pid, 0)

    @contextlib.contextmanager
    def adoption(self) -> Iterator[None]:
        """While a process is being forked for adoption, no ended child counts as an orphan: it may be that one."""
        self._adoptions += 1
        try:
            yield
        finally:
            self._adoptions -= 1

    def _known_pids(self) -> set[int]:
        return self._starting | {process.pid for process in self._processes.values() if process.alive}

    async def _add(self, name: str, pid: int, descriptors: Sequence[int], reap: Callable[[], int]) -> Process:
        self._starting.add(pid)
        try:
            outputs = [await OutputReader.read(descriptor, name, self._print_line) for descriptor in descriptors]
            process = Process(name, pid, outputs, reap)
        finally:
            self._starting.discard(pid)
        self._replace(process)
        process.exited.add_done_callback(lambda _: self._on_exit(process))
        self._notify(process)
        return process

    def _replace(self, process: Process) -> None:
        previous = self._processes.get(process.name)
        process.restarts = previous.restarts + 1 if previous else 0
        self._processes[process.name] = process

    def _on_exit(self, process: Process) -> None:
        self.reap_orphans()
        self._notify(process)

    def _notify(self, process: Process) -> None:
        for listener in list(self._listeners):
            listener(process)


async def _wait_all(processes: Sequence[Process], seconds: float) -> None:
    if processes:
        await asyncio.wait([process.exited for process in processes], timeout=seconds)


def _wait_for(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)

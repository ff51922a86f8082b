"""Background programs that outlive the command that started them and are found again by files.

A program is known by NAME.pid and NAME.log in a folder. It leads a process group, so that a signal reaches what it
wraps (nsenter and the program inside) but not what has left the group on purpose (containerd's shims).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .errors import ClusterError
from .waiting import wait_until

STOP_SECONDS = 10.0


@dataclass(kw_only=True)
class Daemon:
    """One background program; `start` and `stop` may be called whatever state it is in."""

    name: str
    folder: Path
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        """Its output, of all its runs."""
        return self.folder / f"{self.name}.log"

    @property
    def _record(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def start(
        self, command: Sequence[str], *, dies_with_parent: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts it unless it runs. With `dies_with_parent` the kernel ends it when the calling thread is gone."""
        if self.running():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if dies_with_parent:
            command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=dict(environment) if environment is not None else None,
                start_new_session=True,
            )
        started = psutil.Process(self._child.pid).create_time()
        self._record.write_text(json.dumps({"pid": self._child.pid, "started": started}))

    def pid(self) -> int | None:
        """Process and group id; None where it was never started or its number belongs to another by now."""
        try:
            record = json.loads(self._record.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(record["pid"]).create_time() != record["started"]:
                return None
        return int(record["pid"])

    def running(self) -> bool:
        """Whether the program itself lives."""
        if self._child is not None:
            self._child.poll()
        pid = self.pid()
        try:
            return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def wait(self) -> None:
        """Returns when the program ends; only for one that this process has started."""
        if self._child is not None:
            self._child.wait()

    def members(self) -> list[int]:
        """Living processes of its group."""
        if self._child is not None:
            self._child.poll()
        group = self.pid()
        if group is None:
            return []
        found: list[int] = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found

    def signal(self, number: signal.Signals) -> None:
        """To every process of its group."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL, and waits until its whole group is gone."""
        self.signal(signal.SIGKILL)
        wait_until(lambda: not self.members(), what=f"end of {self.name}", seconds=STOP_SECONDS)
        if self._child is not None:
            # A zombie whose threads have not ended yet still holds its ports. Killed again, should its record be lost.
            self._child.kill()
            self._child.wait()
        self._record.unlink(missing_ok=True)

    def stop(self, *, grace: float = STOP_SECONDS) -> None:
        """SIGTERM, then SIGKILL past the grace."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(ClusterError):
            wait_until(lambda: not self.members(), what=f"end of {self.name}", seconds=grace)
        self.kill()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log, for error messages."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return f"{self.name} has written nothing"
        state = "runs" if self.running() else "has ended"
        return f"{self.name} {state}; the end of {self.log}:\n" + "\n".join(lines[-count:])


def kill_forgotten(folder: Path, programs: Path) -> None:
    """Kills daemons of a folder whose records are lost: they work there, and are a program of ours or hold one."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            ours = Path(process.exe()).is_relative_to(programs) or Path(process.exe()).name in ("unshare", "nsenter")
            if ours and Path(process.cwd()).is_relative_to(folder):
                process.kill()
                process.wait(STOP_SECONDS)


def run(command: Sequence[str], *, input_text: str | None = None, seconds: float = 120) -> str:
    """Runs a command to its end and returns its output; raises with all of it where it fails."""
    try:
        result = subprocess.run(list(command), capture_output=True, text=True, input=input_text, timeout=seconds)
    except FileNotFoundError as error:
        raise ClusterError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(command)}: not done within {seconds:.0f} s") from error
    if result.returncode != 0:
        output = (result.stdout + result.stderr).strip()
        raise ClusterError(f"{' '.join(command)}: exit code {result.returncode}\n{output[-4000:]}")
    return result.stdout

"""A program that holds Linux namespaces open, and commands that run inside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import binaries
from .errors import ClusterError
from .processes import Daemon, run
from .waiting import wait_until

START_SECONDS = 10.0
FLAGS = {"net": "--net", "mount": "--mount", "pid": "--pid"}


@dataclass(kw_only=True)
class Namespaces:
    """New namespaces of the given kinds (net, mount, pid).

    The holder is the first process of its process namespace: when it ends, the kernel ends every process inside,
    and with the last process go all mounts, links and addresses that were made inside.
    """

    holder: Daemon
    kinds: tuple[str, ...]

    def create(self) -> None:
        """Makes them unless they exist."""
        command = ["unshare", *(FLAGS[kind] for kind in self.kinds), "--fork", "--kill-child"]
        if "mount" in self.kinds:
            command += ["--propagation=private"]
        if "pid" in self.kinds:
            command += ["--mount-proc"]
        self.holder.start([*command, "--", str(binaries.path(binaries.PAUSE))])
        wait_until(
            lambda: self.exist() or None, what=self.holder.name, seconds=START_SECONDS, explain=self.holder.last_lines
        )

    def exist(self) -> bool:
        """Whether commands can enter."""
        return self._first() is not None

    def is_furnished(self) -> bool:
        """Whether `furnished` was called since they were made."""
        record = self._furnished
        return self.exist() and record.exists() and record.read_text() == str(self.first_process())

    def furnished(self) -> None:
        """Notes that all that belongs inside has been made, so that an interrupted start is seen as such."""
        self._furnished.write_text(str(self.first_process()))

    @property
    def _furnished(self) -> Path:
        return self.holder.folder / f"{self.holder.name}.furnished"

    def first_process(self) -> int:
        """Its process id, as seen from outside."""
        first = self._first()
        if first is None:
            raise ClusterError(f"{self.holder.name} is not running")
        return first

    def entering(self, command: Sequence[str], *, only: Sequence[str] = ()) -> list[str]:
        """The command, as it runs inside (inside `only` these kinds, if given)."""
        flags = [FLAGS[kind] for kind in only or self.kinds]
        return ["nsenter", f"--target={self.first_process()}", *flags, "--", *command]

    def run(self, command: Sequence[str], *, only: Sequence[str] = ()) -> str:
        """Runs a command inside and returns its output."""
        return run(self.entering(command, only=only))

    def destroy(self) -> None:
        """Ends the holder and with it everything inside."""
        # The kernel ends all others of a process namespace before its first process is gone.
        self.holder.kill()

    def _first(self) -> int | None:
        """The holder's child; unshare stays outside."""
        pid = self.holder.pid()
        if pid is None or not self.holder.running():
            return None
        try:
            children = psutil.Process(pid).children()
            return next((child.pid for child in children if child.exe() == str(binaries.path(binaries.PAUSE))), None)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None

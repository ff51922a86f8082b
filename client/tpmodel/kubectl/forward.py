"""Ports of a pod on this machine, through `kubectl port-forward`."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from tpmodel.kubectl import problems
from tpmodel.kubectl.kubectl import Kubectl
from tpmodel.kubectl.problems import KubectlError

START_SECONDS = 30.0
_ADDRESS = "127.0.0.1"
_TAKEN = re.compile(r"^Unable to listen on port", re.IGNORECASE)
_FORWARDING = re.compile(rf"^Forwarding from {re.escape(_ADDRESS)}:(\d+) -> (\d+)")


class PortForward:
    """One running `kubectl port-forward`."""

    def __init__(self, process: subprocess.Popen[str], remote_ports: Sequence[int]) -> None:
        """Use `forwarding`."""
        self._process = process
        self._remote_ports = remote_ports
        self._local: dict[int, int] = {}
        self._changed = threading.Event()
        self._errors: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_output, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def local_port(self, remote: int) -> int:
        """Where a port of the pod is on this machine."""
        return self._local[remote]

    def start(self, seconds: float = START_SECONDS) -> None:
        """Waits until all ports listen.

        Raises:
            KubectlError: kubectl gave up, or took too long.
        """
        deadline = time.monotonic() + seconds
        while len(self._local) < len(self._remote_ports):
            if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                raise KubectlError(f"kubectl port-forward has not begun to listen within {seconds:.0f} s")
            self._changed.clear()
            if any(_TAKEN.match(line) for line in list(self._errors)):
                # kubectl would go on with the other ports.
                raise problems.explain("".join(self._errors))
            if self._process.poll() is not None and len(self._local) < len(self._remote_ports):
                raise problems.explain(self._all_errors())

    def wait(self, seconds: float) -> str:
        """Waits at most so long for kubectl to end by itself; its last words, empty while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self.ended

    @property
    def ended(self) -> str:
        """kubectl's last words, if it has ended; it does when the pod goes away."""
        return "" if self._process.poll() is None else problems.last_words(self._all_errors())

    def stop(self) -> None:
        """Ends kubectl. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _all_errors(self) -> str:
        for reader in self._readers:
            reader.join(1)
        return "".join(self._errors)

    def _read_output(self, stream: IO[str]) -> None:
        """To its end: kubectl says a line for every connection, and would wait for a full pipe."""
        for line in stream:
            if found := _FORWARDING.match(line):
                self._local[int(found[2])] = int(found[1])
                self._changed.set()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._changed.set()

    def _read_errors(self, stream: IO[str]) -> None:
        for line in stream:
            self._errors.append(line)
            del self._errors[:-50]
            self._changed.set()


@contextlib.contextmanager
def forwarding(kubectl: Kubectl, pod: str, ports: dict[int, int]) -> Iterator[PortForward]:
    """The pod's ports on this machine, as long as the block lasts.

    Args:
        kubectl: for the cluster.
        pod: its name.
        ports: local ports by the pod's port; 0: any free one.

    Raises:
        KubectlError: it did not come about.
    """
    pairs = [f"{local or ''}:{remote}" for remote, local in ports.items()]
    process = kubectl.open("port-forward", f"--address={_ADDRESS}", f"pod/{pod}", *pairs)
    forward = PortForward(process, list(ports))
    try:
        forward.start()
        yield forward
    finally:
        forward.stop()

"""A server on this machine for as long as a `with` block lasts: for scripts, notebooks and tests.

    with LocalServer("path/to/checkpoint", tp=2, device="cpu") as server, Client(server.target) as client:
        print(client.complete("Hello", max_tokens=16).text)

Needs the worker extra: it runs `tpmodel serve` as a process of its own.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_PORTS = range(10_000, 30_000)
"""Above servers' usual ports, and below what Linux (32768 and up) and others choose by themselves."""
READY = re.compile(r"ready: grpc (?P<grpc>\S+) http (?P<http>\S+)")


class ServerFailedError(Exception):
    """The server ended, or did not get ready in time; carries its exit code and last lines."""

    def __init__(self, message: str, *, exit_code: int | None, last_lines: Sequence[str]) -> None:
        super().__init__("\n".join([message, *last_lines]))
        self.exit_code = exit_code
        self.last_lines = tuple(last_lines)


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on at present.

    They are none of those that the system itself chooses, for connections and for port 0: so nobody gets one of them
    by chance before the caller listens, and no client that tries one too early gets connected to itself.
    """
    chosen: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(chosen) == count:
            return chosen
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            chosen.append(port)
    raise OSError(f"no {count} ports between {_PORTS.start} and {_PORTS.stop} are free")


class LocalServer:
    """One `tpmodel serve`.

    Attributes:
        target: address of the gRPC inference port.
        http_url: base of the HTTP endpoints.
        health_target: address of health and status.
        control_target: address of the control port, which trainers connect to.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tp: int = 1,
        device: str = "auto",
        options: Sequence[str] = (),
        start_timeout: float = 300.0,
        stop_timeout: float = 60.0,
        environment: dict[str, str] | None = None,
        echo: bool = False,
    ) -> None:
        """options: further ones of `tpmodel serve`; echo: pass the server's output on as it comes."""
        control, health, metrics = free_ports(3)
        self._ports = ["--port", "0", "--http-port", "0", "--control-port", str(control)]
        self._ports += ["--health-port", str(health), "--metrics-port", str(metrics)]
        self._arguments = ["serve", str(model), "--tp", str(tp), "--device", device, *options]
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._environment = environment
        self._echo = echo
        self._ready = threading.Event()
        self._lines: list[str] = []
        self._readers: list[threading.Thread] = []
        self._process: subprocess.Popen[str] | None = None
        self.target = ""
        self.http_url = ""
        self.health_target = f"127.0.0.1:{health}"
        self.control_target = f"127.0.0.1:{control}"
        self.metrics_url = f"http://127.0.0.1:{metrics}/metrics"

    @property
    def process(self) -> subprocess.Popen[str]:
        """The supervisor process; only after start."""
        assert self._process is not None, "the server was not started"
        return self._process

    @property
    def output(self) -> str:
        """What the server has printed so far, both streams."""
        return "\n".join(self._lines)

    def launch(self) -> Self:
        """Starts the process without waiting for it to be ready."""
        command = [sys.executable, "-m", "tpmodel", *self._arguments, *self._ports]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        for stream, sink in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr)):
            assert stream is not None
            reader = threading.Thread(target=self._read, args=(stream, sink), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def start(self) -> Self:
        """Starts the process and waits until it serves.

        Raises:
            ServerFailedError: it ended, or took longer than start_timeout seconds.
        """
        self.launch()
        deadline = time.monotonic() + self._start_timeout
        while not self._ready.wait(0.05):
            if self.process.poll() is not None:
                raise self._failure(f"the server ended with exit code {self.process.returncode}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise self._failure(f"the server was not ready within {self._start_timeout:.0f} s")
        return self

    def stop(self) -> int:
        """Drains and ends the server; returns its exit code. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait(self._stop_timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait(10)
            raise

    def wait(self, timeout: float) -> int:
        """Waits for the server to end by itself; returns its exit code."""
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(timeout=5)
        return code

    def _read(self, stream: IO[str], sink: IO[str]) -> None:
        for line in stream:
            self._lines.append(line.rstrip("\n"))
            if self._echo:
                print(line, end="", file=sink, flush=True)
            if not self._ready.is_set() and (match := READY.search(line)):
                self.target, self.http_url = match["grpc"], match["http"]
                self._ready.set()

    def _failure(self, message: str) -> ServerFailedError:
        code = self.process.wait(timeout=10)
        for reader in self._readers:
            reader.join(timeout=5)
        return ServerFailedError(message, exit_code=code, last_lines=self._lines[-20:])

    def __enter__(self) -> Self:
        """Starts it."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it; where the block failed, shows the server's last lines beside the error."""
        if error is not None and not self._echo:
            print("\n".join(["last lines of the server:", *self._lines[-40:]]), file=sys.stderr)
        self.stop()

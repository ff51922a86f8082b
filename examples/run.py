"""The main job on the embedded default: serve a small model with two ranks, ask it something, stop.

Does what a user does by hand: `tpmodel serve`, `tpmodel generate`, `tpmodel status`, Ctrl-C.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpmodel import ChatMessage, Client

MODEL = Path(__file__).parent / "default_model"
READY = re.compile(r"ready: grpc (\S+)")
START_SECONDS = 180
STOP_SECONDS = 60
QUESTIONS = ["Tell me a story about a fox.", "What is tensor parallelism?"]


def free_port() -> int:
    """A port that nobody listens on at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tpmodel(*arguments: str) -> list[str]:
    """The command line of the tpmodel command in this environment."""
    return [sys.executable, "-m", "tpmodel", *arguments]


@contextmanager
def served(health_port: int) -> Iterator[str]:
    """Runs `tpmodel serve` and gives its gRPC address; ends with a drain."""
    ports = ["--port", "0", "--http-port", "0", "--control-port", "0", "--metrics-port", "0"]
    command = tpmodel("serve", str(MODEL), "--served-name", "default", "--tp", "2", "--device", "cpu",
                      "--dtype", "float32", "--health-port", str(health_port), "--drain-timeout", "10",
                      "--log-format", "text", *ports)  # fmt: skip
    print("$", " ".join(["tpmodel", *command[3:]]), flush=True)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(START_SECONDS, server.kill)
    watchdog.start()
    try:
        yield _wait_until_ready(server)
    finally:
        watchdog.cancel()
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=STOP_SECONDS)
        print(f"stopped with exit code {code}", flush=True)
    if code != 0:
        sys.exit(code)


def _wait_until_ready(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if ready := READY.search(line):
            return ready[1]
    sys.exit(f"the server ended before it was ready, with exit code {server.wait()}")


def main() -> None:
    """Serves, asks, shows the ranks, stops."""
    health_port = free_port()
    with served(health_port) as target, Client(target) as client:
        for question in QUESTIONS:
            print(f"\n> {question}", flush=True)
            for chunk in client.generate([ChatMessage("user", question)], max_tokens=120, timeout=60):
                print(chunk.text, end="", flush=True)
            print(flush=True)
        print("\n$ tpmodel status", flush=True)
        subprocess.run(tpmodel("status", "--target", f"127.0.0.1:{health_port}"), check=True, timeout=30)


if __name__ == "__main__":
    main()

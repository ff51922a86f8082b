"""A client pod: runs the project's own client in the cluster, from the worker's image."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.waiting import wait_until
from tests.e2e.support import client_program, manifests
from tpmodel_operator import names

PROGRAM = Path(client_program.__file__)
FOLDER = "/client"
READY_SECONDS = 120.0
"""For a pod whose image is on the node; kubelet may be starting others."""
SPREAD_SECONDS = 120.0
"""For a client to find all gangs: names are remembered for up to 30 s, and connections made anew after that."""
END_SECONDS = 300.0
"""For running streams to end: longer than any test's streams last."""
ANSWERED = re.compile(r'^tpmodel_requests_total\{.*code="OK".*\} (\d+)', re.MULTILINE)
RUNNING = re.compile(r"^tpmodel_requests_running(?:\{.*\})? (\d+)", re.MULTILINE)
LOOK_UP = "import sys, socket; print(socket.getaddrinfo(sys.argv[1], None, socket.AF_INET)[0][4][0])"
READ_URL = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


@dataclass(frozen=True)
class Client:
    """The pod `name` in kubectl's namespace."""

    kubectl: Kubectl
    name: str

    @classmethod
    def start(cls, kubectl: Kubectl, image: str, *, name: str = "client", node: str = "") -> Client:
        """Creates the pod, on a certain node where one is named, and returns when it runs."""
        program = {PROGRAM.name: PROGRAM.read_text()}
        kubectl.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": program},
            _pod(name, image, node),
        )
        kubectl.wait("pod", name, "condition=Ready", seconds=READY_SECONDS)
        return cls(kubectl, name)

    def stop(self) -> None:
        """Deletes the pod."""
        self.kubectl.delete("pod", self.name, grace=0)
        self.kubectl.delete("configmap", self.name)

    def complete(self, target: str, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Token ids of each prompt's answer; `options` as the client takes them."""
        request = json.dumps({"target": target, "prompts": prompts, "options": options})
        lines = self.run("complete", given=request).splitlines()
        answers = {answer["number"]: answer["token_ids"] for answer in map(json.loads, lines)}
        return [answers[number] for number in range(len(prompts))]

    def load(self, target: str, *, streams: int, tokens: int, seconds: float = END_SECONDS, pause: float = 0.0) -> Load:
        """Keeps so many streams open, see client_program.load; to be used in a `with` block."""
        arguments = {"target": target, "streams": streams, "tokens": tokens, "seconds": seconds, "pause": pause}
        return Load(self.kubectl.command(*self._command("load", json.dumps(arguments))))

    @contextlib.contextmanager
    def load_on_all(self, leaders: Sequence[Object], target: str, *, streams: int, **load: Any) -> Iterator[Load]:
        """A load of which each of these leader pods runs a stream.

        A client knows the gangs that the cluster's name server knew when it asked, and connects to one after the
        other: streams that begin soon after may all be on one gang. Then the load is left, and another begun.
        """
        deadline = time.monotonic() + SPREAD_SECONDS
        while True:
            with self.load(target, streams=streams, **load) as begun:
                begun.wait_begun(streams)
                running = [self.running(leader) for leader in leaders]
                if all(running):
                    yield begun
                    return
                begun.stop()
            assert begun.failures() == []
            assert time.monotonic() < deadline, f"streams of one client on the gangs: {running}"

    def run(self, *arguments: str, given: str = "") -> str:
        """Runs the client program to its end."""
        return self.kubectl.run(*self._command(*arguments), standard_input=given, seconds=END_SECONDS)

    def read(self, url: str) -> str:
        """What a URL in the cluster answers."""
        return self.kubectl.execute(self.name, "python3", "-c", READ_URL, url)

    def look_up(self, name: str) -> str:
        """The address that a name has in the cluster."""
        return self.kubectl.execute(self.name, "python3", "-c", LOOK_UP, name).strip()

    def answered(self, leader: Object) -> int:
        """Requests that a leader pod has answered well since it started, by its own metrics."""
        return self._count(leader, ANSWERED)

    def running(self, leader: Object) -> int:
        """Requests that run on a leader pod's gang now, by its own metrics."""
        return self._count(leader, RUNNING)

    def _count(self, pod: Object, metric: re.Pattern[str]) -> int:
        metrics = self.read(f"http://{pod['status']['podIP']}:{names.METRICS_PORT}/metrics")
        return sum(map(int, metric.findall(metrics)))

    def _command(self, *arguments: str) -> list[str]:
        return ["exec", "--stdin", self.name, "--", "python3", f"{FOLDER}/{PROGRAM.name}", *arguments]


@dataclass
class Load:
    """Streams that a client keeps open, until stopped."""

    command: list[str]
    lines: list[Object] = field(default_factory=list)
    """What the client has said so far: see client_program.Record."""
    _process: subprocess.Popen[str] | None = None
    _reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Starts it, and returns when a first stream has begun."""
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        self.wait_begun(1)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Stops it; a failed test does not wait for running streams."""
        assert self._process is not None
        if kind is None:
            self.stop()
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """No stream begins any more, and those that run are left once they have another token. Idempotent."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._reader is not None
        self._process.stdin.close()
        code = self._process.wait(END_SECONDS)
        self._reader.join()
        assert code == 0, f"the client ended with {code}: {self.lines[-5:]}"

    def wait_begun(self, count: int, *, seconds: float = 60.0) -> None:
        """Returns when that many streams have had their first token since the start."""
        what = f"{count} streams that have begun"
        wait_until(lambda: len(self.begun()) >= count, what=what, seconds=seconds, explain=lambda: str(self.lines[-5:]))

    def begun(self) -> list[Object]:
        """Streams that have had their first token."""
        return [line for line in self.lines if line.get("event") == "begun"]

    def ended(self) -> list[Object]:
        """Streams that have ended, well or not."""
        return [line for line in self.lines if line.get("event") == "ended"]

    def failures(self) -> list[Object]:
        """Streams that failed or were cut, even where the client went on elsewhere; and what is no report."""
        return [line for line in self.lines if "event" not in line or line.get("error") or line.get("cuts")]

    def running_at(self, moment: float) -> list[float]:
        """Seconds that each stream lasted which ran at a moment, a time.time() of this machine's."""
        return [
            line["ended"] - line["first_token"]
            for line in self.ended()
            if line["first_token"] and line["first_token"] < moment < line["ended"]
        ]

    def _read(self, output: IO[str]) -> None:
        for line in output:
            try:
                self.lines.append(json.loads(line))
            except json.JSONDecodeError:
                self.lines.append({"unexpected": line.rstrip()})


def _pod(name: str, image: str, node: str) -> Object:
    container: Object = {
        "name": "client",
        "image": image,
        "command": ["sleep", "infinity"],
        "securityContext": manifests.RESTRICTED_CONTAINER,
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        "volumeMounts": [{"name": "program", "mountPath": FOLDER}],
    }
    spec: Object = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": manifests.RESTRICTED_POD,
        "containers": [container],
        "volumes": [{"name": "program", "configMap": {"name": name}}],
    }
    if node:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}

"""Whole gangs of several pods on one machine: every pod a `tpmodel-worker` of its own, at a loopback address.

127.0.0.0/8 belongs to this machine, so each pod has an IP and the ports are the fixed ones. Names are looked up in a
file in the place of a cluster's name service.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
from grpc_health.v1 import health_pb2

from tpmodel.v1 import worker_pb2, worker_pb2_grpc

T = TypeVar("T")

MODEL = Path(__file__).parents[2] / "examples" / "default_model"
TESTS = Path(__file__).parents[1]
WAIT_SECONDS = 120.0
TOKEN = "a token for gangs"
LEADER = "gang-0.pods.test"
READY = "tpmodel.v1.Ready"
_PROGRAM = "from support.gang_pods import program; program()"
_NAMES = "GANG_NAMES"


def program() -> None:
    """What a pod's process runs: the real command, with names of the domain .test out of a file."""
    ask_system = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(host, str) and host.endswith(".test"):
            names = json.loads(Path(os.environ[_NAMES]).read_text())
            if host not in names:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = names[host]
        return ask_system(host, *arguments, **options)

    socket.getaddrinfo = look_up
    from tpmodel_worker.supervisor.command import main

    main()


def loopback_address() -> str:
    """One that no other test uses."""
    return f"127.{random.randint(16, 250)}.{random.randint(0, 250)}.{random.randint(2, 250)}"


class GangPod:
    """One pod's supervisor process."""

    def __init__(
        self,
        gang: Gang,
        index: int,
        *,
        attempt: int,
        options: Sequence[str],
        uid: str,
        prefix: Sequence[str],
        ip: str,
    ) -> None:
        self.index = index
        self.ip = ip or loopback_address()
        self.uid = uid or str(uuid.uuid4())
        self.name = f"{gang.folder.name}-{index}"
        self.folder = gang.folder / f"pod-{index}-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir(parents=True)
        # Paths of Unix sockets are short.
        self._runtime = tempfile.TemporaryDirectory(prefix="gang-", dir="/tmp")
        (self.folder / "termination-log").touch()
        self.leave_word(attempt=f"{attempt}\n", **gang.word)
        command = [sys.executable, "-c", _PROGRAM, *gang.arguments, *options]
        command += [f"--runtime-dir={self._runtime.name}", f"--attempt-file={self.folder / 'attempt'}"]
        environment = os.environ | gang.environment | {
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            _NAMES: str(gang.names_file),
            "TPMODEL_POD_NAME": self.name,
            "TPMODEL_POD_UID": self.uid,
            "TPMODEL_POD_IP": self.ip,
            "TPMODEL_POD_INDEX": str(index),
            # A pod sees its own device only, where there are devices.
            "CUDA_VISIBLE_DEVICES": str(index),
            "TPMODEL_TERMINATION_LOG": str(self.folder / "termination-log"),
        }  # fmt: skip
        with (self.folder / "output").open("wb") as output:
            self.process = psutil.Popen(
                [*prefix, *command, f"--host={self.ip}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )

    def leave_word(self, **files: str) -> None:
        """What the operator leaves in the gang's ConfigMap, as it comes into the pod; `_` stands for `-`."""
        for name, text in files.items():
            new = self.folder / f"{name}.new"
            new.write_text(text)
            new.rename(self.folder / name.replace("_", "-"))

    @property
    def output(self) -> str:
        """All that was printed so far."""
        return (self.folder / "output").read_text(errors="replace")

    @property
    def target(self) -> str:
        """For clients; a leader pod's."""
        return f"{self.ip}:9000"

    @property
    def termination_message(self) -> str:
        """What was left for Kubernetes."""
        return (self.folder / "termination-log").read_text()

    def eventually(self, condition: Callable[[], T], what: str, seconds: float = WAIT_SECONDS) -> T:
        """Waits until the condition holds, and returns its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if self.ended:
                deadline = min(deadline, time.monotonic() + 1)
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.output}")
            time.sleep(0.02)
        return value

    def health(self, service: str = READY) -> bool:
        """What a probe would find; False where nobody answers."""
        with grpc.insecure_channel(f"{self.ip}:9002") as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            try:
                answer = check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            except grpc.RpcError:
                return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def gang_status(self) -> worker_pb2.GangStatusResponse:
        """Asked on the health port."""
        with grpc.insecure_channel(f"{self.ip}:9002") as channel:
            stub = worker_pb2_grpc.StatusServiceStub(channel)
            return stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=WAIT_SECONDS, wait_for_ready=True)

    def pid_of(self, name: str) -> int:
        """Of the newest process of that name."""
        return next(process.pid for process in self.gang_status().processes if process.name == name)

    def wait_ready(self) -> None:
        """Waits for the readiness probe."""
        self.eventually(lambda: self.health() or self.ended, "ready")
        assert not self.ended, self.output

    @property
    def ended(self) -> bool:
        """Whether the supervisor is gone."""
        return self.process.poll() is not None

    def wait_exit(self, seconds: float = WAIT_SECONDS) -> int:
        """The supervisor's exit code."""
        try:
            return self.process.wait(seconds)
        except psutil.TimeoutExpired as error:
            raise AssertionError(f"pod {self.index} did not end within {seconds} s\n{self.output}") from error

    def kill(self) -> None:
        """As a node that loses power: nothing of the pod is left."""
        if not self.ended:
            descendants = self.process.children(recursive=True)
            self.process.kill()
            self.process.wait(10)
            _, left = psutil.wait_procs(descendants, 5)
            for process in left:
                process.kill()
        self._runtime.cleanup()


class Gang:
    """The pods of one gang over time, and the names that lead to them."""

    def __init__(
        self,
        folder: Path,
        *,
        ranks: int = 2,
        device: str = "cpu",
        model: Sequence[str] | None = None,
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        """model: the flags that name it; options: further flags of every pod."""
        self.folder = folder
        self.environment = environment or {}
        self.names_file = folder / "names.json"
        self.names: dict[str, str] = {}
        self.pods: list[GangPod] = []
        self.word: dict[str, str] = {}
        """What the operator has left for pods that start from now on, beside the attempt."""
        (folder / "token").write_text(TOKEN)
        self.arguments = [
            *(model or [f"--model-uri=file://{MODEL}", f"--model-path={MODEL}"]),
            f"--tensor-parallel-size={ranks}",
            "--ranks-per-pod=1",
            f"--leader-host={LEADER}",
            f"--device={device}",
            "--dtype=float32",
            "--engine-option=kv_cache_memory=8M",
            f"--token-file={folder / 'token'}",
            "--log-format=text",
            *options,
        ]
        self.publish()

    def publish(self, **names: str | None) -> None:
        """Changes what the name service answers; the leader's name is `leader`, None removes it."""
        for name, address in names.items():
            known_as = LEADER if name == "leader" else name
            if address is None:
                self.names.pop(known_as, None)
            else:
                self.names[known_as] = address
        new = self.names_file.with_suffix(".new")
        new.write_text(json.dumps(self.names))
        new.rename(self.names_file)

    def start(
        self,
        index: int,
        *,
        attempt: int = 1,
        options: Sequence[str] = (),
        publish: bool = True,
        uid: str = "",
        prefix: Sequence[str] = (),
        ip: str = "",
    ) -> GangPod:
        """Starts a pod.

        Args:
            index: which.
            attempt: of the gang.
            options: further flags.
            publish: a leader pod's name is known at once.
            uid: of a pod whose container is started again; "": a new one.
            prefix: a command that runs the pod's.
            ip: the pod's, where it has a network of its own; "": any loopback address.
        """
        pod = GangPod(self, index, attempt=attempt, options=options, uid=uid, prefix=prefix, ip=ip)
        self.pods.append(pod)
        if index == 0 and publish:
            self.publish(leader=pod.ip)
        return pod

    def start_all(self, count: int = 2) -> list[GangPod]:
        """Starts the pods and waits until all are ready."""
        pods = [self.start(index) for index in range(count)]
        for pod in pods:
            pod.wait_ready()
        return pods

    def close(self) -> None:
        """Ends whatever is left."""
        for pod in self.pods:
            pod.kill()


@contextlib.contextmanager
def running_gang(folder: Path, **options: Any) -> Iterator[Gang]:
    """A gang whose pods do not outlive the block."""
    gang = Gang(folder, **options)
    try:
        yield gang
    finally:
        gang.close()

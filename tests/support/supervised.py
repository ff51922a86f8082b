"""A supervisor as a process of its own, with stand-ins for everything that it starts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
from grpc_health.v1 import health_pb2

from support.stand_ins import FOLDER
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.settings import ServeSettings

T = TypeVar("T")

TOKEN = "a token for tests"
WAIT_SECONDS = 60.0
"""Longer than anything takes; a machine with other work needs most of it."""
TESTS = Path(__file__).parents[1]
PROGRAM = "from support.supervised import program; program()"
MODEL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def stand_in_settings(folder: Path, **changes: Any) -> ServeSettings:
    """Settings for a pod of stand-ins, every port any free one."""
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    settings = ServeSettings(
        model_path=str(folder),
        model_id="stand-in",
        served_name="stand-in",
        world_size=2,
        token=TOKEN,
        port=0,
        http_port=0,
        control_port=0,
        health_port=0,
        metrics_port=0,
        drain_timeout=5.0,
        log_format="text",
    )
    return dataclasses.replace(settings, **changes)


def program() -> None:
    """What the supervisor's process runs. Arguments: settings as JSON, termination log, whether ranks are real."""
    from tpmodel_worker import logs
    from tpmodel_worker.supervisor.entries import EntryPoints
    from tpmodel_worker.supervisor.main import run_supervisor
    from tpmodel_worker.supervisor.terminal import Terminal

    command = (sys.executable, "-m", "support.stand_ins")
    entries = EntryPoints(engine=(*command, "engine"), api=(*command, "api"))
    if sys.argv[3] != "real ranks":
        entries = dataclasses.replace(
            entries,
            rank="support.stand_ins:run_rank",
            spare="support.stand_ins:run_spare",
            rendezvous="support.stand_ins:run_rendezvous",
            preload=("support.stand_ins",),
        )
    settings = ServeSettings.from_json(sys.argv[1])
    logs.configure("supervisor", settings.log_format)
    on_event = Terminal(settings.log_format).on_event
    sys.exit(
        asyncio.run(run_supervisor(settings, on_event=on_event, entries=entries, termination_log=Path(sys.argv[2])))
    )


class Supervised:
    """One supervisor, the files that steer its stand-ins, and views of what happens."""

    def __init__(self, folder: Path, settings: ServeSettings, *, real_ranks: bool = False) -> None:
        self.folder = folder
        self._ranks = "real ranks" if real_ranks else "stand-ins"
        self.settings = settings
        self._output = folder / "output"
        self.process: psutil.Popen | None = None

    def start(self) -> None:
        """Starts the supervisor's process."""
        environment = os.environ | {
            FOLDER: str(self.folder),
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
        }
        termination_log = self.folder / "termination-log"
        termination_log.touch()
        with self._output.open("wb") as output:
            self.process = psutil.Popen(
                [sys.executable, "-c", PROGRAM, self.settings.to_json(), str(termination_log), self._ranks],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )

    def steer(self, **files: object) -> None:
        """Writes files that the stand-ins read; None removes one."""
        for name, content in files.items():
            path = self.folder / name
            if content is None:
                path.unlink(missing_ok=True)
                continue
            text = content if isinstance(content, str) else json.dumps(content)
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").rename(path)

    @property
    def pid(self) -> int:
        """The supervisor's."""
        assert self.process is not None
        return self.process.pid

    @property
    def output(self) -> str:
        """All that was printed so far."""
        return self._output.read_text()

    @property
    def termination_message(self) -> str:
        """What was left for Kubernetes."""
        return (self.folder / "termination-log").read_text()

    def events(self, what: str, **having: object) -> list[dict[str, Any]]:
        """The stand-ins' events of a kind with the given values."""
        path = self.folder / "events"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in events if (event | having | {"what": what}) == event]

    def eventually(self, condition: Callable[[], T], what: str, seconds: float = WAIT_SECONDS) -> T:
        """Waits until the condition holds, and returns its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.output}")
            time.sleep(0.02)
        return value

    def wait_ready(self) -> None:
        """Waits for the line that says so."""
        self.eventually(lambda: "tpmodel: ready:" in self.output or self._ended(), "ready")
        assert "tpmodel: ready:" in self.output, self.output

    def wait_exit(self, seconds: float = WAIT_SECONDS) -> int:
        """The supervisor's exit code."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except psutil.TimeoutExpired as error:
            raise AssertionError(f"the supervisor did not end within {seconds} s\n{self.output}") from error

    def descendants(self) -> list[psutil.Process]:
        """All processes below the supervisor."""
        return psutil.Process(self.pid).children(recursive=True)

    def process_status(self, name: str) -> worker_pb2.ProcessStatus:
        """A process as GangStatus shows it."""
        return next(process for process in self.gang_status().processes if process.name == name)

    def pid_of(self, name: str) -> int:
        """Of the newest process of that name."""
        return self.process_status(name).pid

    def port_setting(self, which: str) -> int:
        """A port as the pod's processes find it in their settings."""
        return int(json.loads(self.settings_file().read_text())[which])

    def settings_file(self) -> Path:
        """Of the running pod."""
        return next(Path(self.settings.runtime_dir).glob("tpmodel-*/settings.json"))

    def health(self, service: str) -> bool:
        """What the health port says of a service."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port_setting('health_port')}") as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def gang_status(self) -> worker_pb2.GangStatusResponse:
        """Asked on the health port."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port_setting('health_port')}") as channel:
            stub = worker_pb2_grpc.StatusServiceStub(channel)
            return stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=5, wait_for_ready=True)

    @contextlib.contextmanager
    def service(self) -> Iterator[worker_pb2_grpc.SupervisorServiceStub]:
        """A stub of the pod's SupervisorService."""
        port = self.eventually(lambda: self.events("register"), "a registration")[-1]["supervisor_port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield worker_pb2_grpc.SupervisorServiceStub(channel)

    def stop(self) -> None:
        """Ends whatever is left."""
        if self.process is not None and self._ended() is False:
            descendants = self.descendants()
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)
            _, left = psutil.wait_procs(descendants, 5)
            for process in left:
                process.kill()

    def _ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None


METADATA = (*token_metadata(TOKEN), ("tpmodel-attempt", "1"))
READY_LINE = re.compile(
    r"^tpmodel: ready: grpc (\S+):(\d+) http http://(\S+):(\d+) model (\S+) tp (\d+) \((\d+\.\d) s\)$", re.MULTILINE
)

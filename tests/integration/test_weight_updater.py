"""`tpmodel-weight-updater` beside a whole server, and a trainer that knows torch and the indexed way only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import torch

from support.indexed_trainer import trained
from support.trainer import TOKEN
from support.updated_server import Served, raw_stream, serve
from support.waiting import until
from tpmodel import Client
from tpmodel.local import free_ports

TESTS = Path(__file__).parents[1]


class Exchange:
    """One trainer, and an updater beside each gang."""

    def __init__(self, gangs: Served | Sequence[Served], folder: Path, *options: str) -> None:
        self.gangs = [gangs] if isinstance(gangs, Served) else list(gangs)
        (port,) = free_ports(1)
        self.updaters = [self.run_updater(index, port, folder, options) for index in range(len(self.gangs))]
        # They all publish the same.
        command = [sys.executable, "-m", "support.indexed_trainer", str(folder / "bridge-0")]
        self.trainer = subprocess.Popen(
            [*command, str(port), str(1 + sum(gang.ranks for gang in self.gangs))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(TESTS)},
        )
        self.expect("joined")

    def run_updater(self, index: int, port: int, folder: Path, options: Sequence[str]) -> subprocess.Popen[str]:
        """Returns once it has said what the trainer needs to know."""
        token, bridge = folder / f"token-{index}", folder / f"bridge-{index}"
        token.write_text(TOKEN)
        command = [sys.executable, "-m", "tpmodel_worker.updater", "--trainer-token-file", str(token)]
        command += ["--log-format", "text"]
        command += ["--gang", self.gangs[index].server.control_target, *options]
        command += ["--gangs", str(len(self.gangs)), "--gang-index", str(index)]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOGDIR": str(bridge)}
        updater = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        until((bridge / "vllm_bridge_config.json").exists, "the names are published", 60)
        return updater

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in (self.trainer, *self.updaters):
            process.kill()
            process.communicate()

    def expect(self, answer: str) -> None:
        assert self.trainer.stdout is not None
        assert self.trainer.stdout.readline() == f"{answer}\n"

    def order(self, *words: object) -> None:
        """Returns once the trainer has done it."""
        assert self.trainer.stdin is not None
        self.trainer.stdin.write(" ".join(map(str, words)) + "\n")
        self.trainer.stdin.flush()
        if words[0] != "die":
            self.expect("done")

    def update(self, seed: int) -> None:
        """A full set; returns once every gang serves it."""
        self.order("set", seed)
        for gang in self.gangs:
            with torch.no_grad():
                for name, parameter in gang.trained.model.named_parameters():
                    parameter.copy_(trained(name, parameter.shape, seed))
            version = gang.next_version()
            until(lambda gang=gang, version=version: gang.served().version == version, f"version {version}")

    def end(self) -> tuple[int, str]:
        """Of the first gang's updater: its exit code and what it wrote."""
        _, text = self.updaters[0].communicate(timeout=60)
        return self.updaters[0].returncode, text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("server"), 2) as server:
        yield server


@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_a_trainer_of_the_indexed_way_updates_a_gang(served: Served, tmp_path: Path, mode: str) -> None:
    """U29, U31, U32, U35: two sets, signs of life and wrong numbers between, and an orderly end."""
    with Exchange(served, tmp_path, "--mode", mode) as exchange:
        for seed in (1, 2):
            exchange.order("index", -1)
            exchange.order("index", 99)
            exchange.update(seed)
            served.check()
        exchange.order("index", -2)
        code, text = exchange.end()
        assert code == 0, text
        assert "the trainer has stopped" in text
        assert "Traceback" not in text
    served.check()


def test_no_step_sees_half_a_set_and_the_version_moves_after_the_whole_one(served: Served, tmp_path: Path) -> None:
    """U35: in place requests wait for the rest; both halves make one version."""
    with Exchange(served, tmp_path) as exchange:
        before = served.version
        exchange.order("some", 3, 10)
        until(lambda: not served.served().HasField("version"), "the set has begun")
        waiting = raw_stream(served.server.target, begun=False)
        exchange.order("index", -1)
        assert not waiting.done()
        assert served.state().weight_version == before
        exchange.update(4)
        waiting.result(60)
        served.check()
        exchange.order("index", -2)
        assert exchange.end()[0] == 0


def test_in_shadow_the_old_version_is_served_until_the_set_is_whole(served: Served, tmp_path: Path) -> None:
    """U35."""
    with Exchange(served, tmp_path, "--mode", "shadow") as exchange:
        served.check()
        exchange.order("some", 5, 10)
        served.check()
        exchange.update(6)
        served.check()


@pytest.mark.parametrize(("order", "message"), [("stop", "the trainer has stopped"), ("die", "the trainer has gone")])
def test_a_trainer_that_ends_in_the_middle_leaves_no_version(
    served: Served, tmp_path: Path, order: str, message: str
) -> None:
    """U34, U35: the updater says so and ends; a full set heals the gang."""
    with Exchange(served, tmp_path) as exchange:
        exchange.order("some", 7, 10)
        until(lambda: not served.served().HasField("version"), "the set has begun")
        exchange.order(*(("index", -2) if order == "stop" else ("die",)))
        code, text = exchange.end()
        assert code == 1
        assert message in text
        assert "Traceback" not in text
    assert served.served().reason == "WeightsIncomplete"
    served.heal()
    served.check()


def test_an_updater_that_is_ended_leaves_the_gang_as_it_is(served: Served, tmp_path: Path) -> None:
    with Exchange(served, tmp_path) as exchange:
        exchange.updaters[0].terminate()
        code, text = exchange.end()
        assert code == 0, text
    served.check()


def test_a_trainer_that_does_not_come_is_an_error_without_a_traceback(served: Served, tmp_path: Path) -> None:
    """U28, U34: bounded."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    command = [sys.executable, "-m", "tpmodel_worker.updater", "--gang", served.server.control_target]
    command += ["--trainer-token-file", str(token), "--master-address", "127.0.0.1", "--master-port", "1"]
    command += ["--join-timeout", "1", "--max-errors", "1", "--log-format", "text"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "the trainer's store at 127.0.0.1:1 can't be reached" in done.stderr
    assert "Traceback" not in done.stderr
    with Client(served.server.target) as client:
        assert client.complete([1, 2, 3], max_tokens=2).token_ids[0]


def test_one_trainer_of_the_indexed_way_updates_two_gangs(
    served: Served, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """U29, U31, U32, U35: each has an updater beside it; every byte is sent once."""
    with serve(tmp_path_factory.mktemp("other"), 2, checkpoint=served.checkpoint) as other:
        gangs = (served, other)
        with Exchange(gangs, tmp_path) as exchange:
            for seed in (11, 12):
                exchange.order("index", -1)
                exchange.update(seed)
                for gang in gangs:
                    gang.check()
            exchange.order("index", -2)
            for updater in exchange.updaters:
                _, text = updater.communicate(timeout=60)
                assert updater.returncode == 0, text
        for gang in gangs:
            gang.check()

"""torch's flight recorder, which two groups of one process can't use at the same time: kept off, and kept apart."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from tpmodel_worker.comm.flight_recorder import keep_off
from tpmodel_worker.comm.gloo import GlooCommunicator
from tpmodel_worker.comm.sockets import Connections

SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
RECORD_ONE_BARRIER = """
import json
from torch._C._distributed_c10d import HashStore, _dump_fr_trace_json
from tpmodel_worker.comm.gloo import open_gloo
from tpmodel_worker.comm.specification import CommunicatorSpec

spec = CommunicatorSpec(
    epoch=1, rank=0, world_size=1, rendezvous="127.0.0.1:1", rendezvous_id="one", timeout_seconds=20, pods=("a",)
)
open_gloo(HashStore(), spec).barrier()
print(len(json.loads(_dump_fr_trace_json()).get("entries", [])))
"""


def recorded(**environment: str) -> int:
    """Collectives that torch has noted of a process with one group and one collective."""
    done = subprocess.run(
        [sys.executable, "-c", RECORD_ONE_BARRIER], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_collectives_are_not_recorded() -> None:
    assert recorded() == 0


def test_whoever_has_set_the_recorders_size_gets_its_records() -> None:
    assert recorded(TORCH_FR_BUFFER_SIZE="10") == 1


@pytest.mark.parametrize("name", SIZES)
def test_either_name_of_the_size_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for either in SIZES:
        monkeypatch.delenv(either, raising=False)
    monkeypatch.setenv(name, "7")
    keep_off()
    assert {either: os.environ[either] for either in SIZES if either in os.environ} == {name: "7"}


class Group:
    """Takes its time to begin a collective, and notes how many groups do so at once."""

    beginning = 0
    most = 0

    def barrier(self) -> Any:
        Group.beginning += 1
        Group.most = max(Group.most, Group.beginning)
        time.sleep(0.05)
        Group.beginning -= 1
        return Done()


class Done:
    def wait(self, _timeout: timedelta) -> None:
        return None

    def is_completed(self) -> bool:
        return True


def test_two_threads_do_not_begin_a_collective_at_the_same_time() -> None:
    """A recorder that somebody has turned on would end the process."""
    communicators = [
        GlooCommunicator(
            rank=0,
            world_size=2,
            epoch=epoch,
            device=torch.device("cpu"),
            group=Group(),  # type: ignore[arg-type]
            connections=Connections("127.0.0.1"),
            deadline_seconds=5,
        )
        for epoch in (1, 2)
    ]
    threads = [threading.Thread(target=communicator.barrier) for communicator in communicators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Group.most == 1

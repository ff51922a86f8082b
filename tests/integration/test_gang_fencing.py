"""Pods of two attempts of one gang at the same time: nobody of the new one obeys the old one, which ends."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.gang_pods import TOKEN, Gang, GangPod, running_gang
from tpmodel import Client
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    with running_gang(tmp_path) as gang:
        yield gang


def serves(pod: GangPod) -> bool:
    with Client(pod.target) as client:
        return len(client.complete("Tell me", max_tokens=4, temperature=0, ignore_eos=True).token_ids[0]) == 4


def test_a_pod_that_finds_its_gang_at_a_higher_attempt_ends_as_stale(gang: Gang) -> None:
    leader = gang.start(0, attempt=2)
    stale = gang.start(1, attempt=1)

    assert stale.wait_exit() == 75

    assert stale.termination_message == "stale attempt: the gang is at attempt 2, this pod is of attempt 1"
    assert not leader.ended
    gang.start(1, attempt=2)
    leader.wait_ready()


def test_an_old_leader_that_still_serves_ends_when_it_meets_the_new_attempt_and_is_never_obeyed(gang: Gang) -> None:
    """Its node does not answer, and its name still leads to it: the new worker pod asks there first."""
    old_leader, old_worker = gang.start_all()
    assert serves(old_leader)

    new_worker = gang.start(1, attempt=2)

    assert old_leader.wait_exit() == 75
    cause = "stale attempt: the gang is at attempt 2, this engine is of attempt 1"
    assert old_leader.termination_message == cause
    assert "joined the gang" not in new_worker.output
    assert not new_worker.health()
    new_leader = gang.start(0, attempt=2)
    new_leader.wait_ready()
    new_worker.wait_ready()
    assert serves(new_leader)
    assert old_worker.wait_exit() == 75, "it looked for a leader, and found that of the next attempt"
    assert old_worker.termination_message.startswith("stale attempt: ")
    assert new_leader.health()


def test_a_worker_pod_keeps_waiting_while_only_an_old_leader_answers(gang: Gang) -> None:
    leader = gang.start(0, attempt=1)
    leader.eventually(lambda: "waiting for rank 1" in leader.output, "its engine listens")

    worker = gang.start(1, attempt=2)

    # The old leader ends, since it has met its successor; the worker pod waits for that.
    assert leader.wait_exit() == 75
    time.sleep(2)
    assert not worker.ended
    assert not worker.health()


def test_ranks_and_supervisors_of_an_attempt_refuse_engines_of_lower_ones(gang: Gang) -> None:
    """An old engine that knows their addresses: whatever it asks for, it is not done."""
    leader = gang.start(0, attempt=3)
    rank_port = _rank_port(leader)
    pid = leader.pid_of("rank 0")
    supervisor_port = _supervisor_port(leader, exclude=rank_port)

    with grpc.insecure_channel(f"{leader.ip}:{supervisor_port}") as channel:
        stub = worker_pb2_grpc.SupervisorServiceStub(channel)
        old = (*token_metadata(TOKEN), ("tpmodel-attempt", "2"))
        calls: list[tuple[Any, Any]] = [
            (stub.Kill, worker_pb2.KillRequest(rank=0, pid=pid)),
            (stub.Respawn, worker_pb2.RespawnRequest(rank=0, epoch=(9 << 32) | 1)),
            (stub.ReleaseMemory, worker_pb2.ReleaseMemoryRequest()),
            (stub.GetSupervisorStatus, worker_pb2.GetSupervisorStatusRequest()),
        ]
        for call, request in calls:
            with pytest.raises(grpc.RpcError, match="the engine is of attempt 2, this pod of attempt 3"):
                call(request, timeout=10, metadata=old)
            with pytest.raises(grpc.RpcError, match="the call's metadata has no tpmodel-attempt"):
                call(request, timeout=10, metadata=token_metadata(TOKEN))
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            stub.Kill(worker_pb2.KillRequest(rank=0, pid=pid), timeout=10, metadata=(("tpmodel-attempt", "9"),))
    assert asyncio.run(_open_session(leader.ip, rank_port, epoch=(2 << 32) | 7)) == "FAILED_PRECONDITION"
    assert asyncio.run(_open_session(leader.ip, rank_port, epoch=(3 << 32) | 7)) == "open"
    assert leader.pid_of("rank 0") == pid
    assert not leader.ended


def test_a_supervisor_that_is_called_from_a_higher_attempt_ends_as_stale(gang: Gang) -> None:
    worker = gang.start(1, attempt=1)
    port = _supervisor_port(worker, exclude=_rank_port(worker))
    with grpc.insecure_channel(f"{worker.ip}:{port}") as channel:
        stub = worker_pb2_grpc.SupervisorServiceStub(channel)
        new = (*token_metadata(TOKEN), ("tpmodel-attempt", "2"))
        with pytest.raises(grpc.RpcError, match="FAILED_PRECONDITION"):
            stub.GetSupervisorStatus(worker_pb2.GetSupervisorStatusRequest(), timeout=10, metadata=new)
    assert worker.wait_exit() == 75
    assert worker.termination_message == "stale attempt: the gang is at attempt 2, this pod is of attempt 1"


def _rank_port(pod: GangPod) -> int:
    """Of the pod's one rank, once it listens."""
    listening = re.compile(r"rank \d listens on \S+:(\d+)")
    pod.eventually(lambda: listening.search(pod.output), "its rank listens")
    return int(listening.findall(pod.output)[0])


def _supervisor_port(pod: GangPod, *, exclude: int) -> int:
    """The one port of the supervisor's own process that is none of the fixed ones."""
    listening = {entry.laddr.port for entry in pod.process.net_connections("tcp") if entry.status == "LISTEN"}
    (port,) = listening - {9000, 8000, 9001, 9002, 9003, exclude}
    return port


async def _open_session(address: str, port: int, epoch: int) -> str:
    """What becomes of a session: "open", or why it was refused."""
    metadata = (*token_metadata(TOKEN), ("tpmodel-epoch", str(epoch)), ("tpmodel-instance", "old"))
    async with grpc.aio.insecure_channel(f"{address}:{port}") as channel:
        stub: worker_pb2_grpc.WorkerServiceAsyncStub = worker_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Session(metadata=metadata)
        try:
            await asyncio.wait_for(call.initial_metadata(), 10)
            code = await asyncio.wait_for(call.code(), 1)
        except TimeoutError:
            return "open"
        finally:
            call.cancel()
        return code.name

"""What runs in a client pod to try calls that only members of a gang may make. Needs the worker's image alone.

    python3 - '<JSON object: address, ports, token, attempt>' < intruder.py

Prints one JSON object: what became of each call, as "OK" or the status code and its details.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from tpmodel.v1 import worker_pb2, worker_pb2_grpc

SECONDS = 10.0
UID = "intruder"


def answer(call: Callable[[], Any]) -> str:
    """What became of a call; of a stream, of its first message."""
    try:
        result = call()
        if isinstance(result, Iterator):
            next(result, None)
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"  # pyright: ignore[reportAttributeAccessIssue]
    return "OK"


def calls(
    address: str, ports: dict[str, int], token: str | None, attempt: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each service at its port, where one is given; token None: none is sent."""
    bearer = () if token is None else (("authorization", f"Bearer {token}"),)
    engine = (*bearer, ("tpmodel-attempt", str(attempt)))
    session = (*bearer, ("tpmodel-epoch", str((attempt << 32) + 1_000_000)), ("tpmodel-instance", UID))

    def at(service: str) -> grpc.Channel:
        return grpc.insecure_channel(f"{address}:{ports[service]}")

    if "gang" in ports:
        gang = worker_pb2_grpc.GangServiceStub(at("gang"))
        register = worker_pb2.RegisterRequest(pod_uid=UID, pod_name=UID, address=address, attempt=attempt)
        drain, follow = worker_pb2.DrainRequest(pod_uid=UID), worker_pb2.FollowRequest(pod_uid=UID)
        yield "Register", lambda: gang.Register(register, timeout=SECONDS, metadata=bearer)
        yield "Drain", lambda: gang.Drain(drain, timeout=SECONDS, metadata=bearer)
        yield "Follow", lambda: gang.Follow(follow, timeout=SECONDS, metadata=bearer)
    if "supervisor" in ports:
        supervisor = worker_pb2_grpc.SupervisorServiceStub(at("supervisor"))
        kill = worker_pb2.KillRequest(rank=1, pid=1)
        status = worker_pb2.GetSupervisorStatusRequest()
        yield "Kill", lambda: supervisor.Kill(kill, timeout=SECONDS, metadata=engine)
        yield "GetSupervisorStatus", lambda: supervisor.GetSupervisorStatus(status, timeout=SECONDS, metadata=engine)
    if "rank" in ports:
        rank = worker_pb2_grpc.WorkerServiceStub(at("rank"))
        abort = worker_pb2.AbortRequest(epoch=(attempt << 32) + 1_000_000)
        yield "GetStatus", lambda: rank.GetStatus(worker_pb2.GetStatusRequest(), timeout=SECONDS, metadata=bearer)
        yield "Abort", lambda: rank.Abort(abort, timeout=SECONDS, metadata=bearer)
        yield "Session", lambda: rank.Session(iter(()), timeout=SECONDS, metadata=session)


if __name__ == "__main__":
    print(json.dumps({name: answer(call) for name, call in calls(**json.loads(sys.argv[1]))}))

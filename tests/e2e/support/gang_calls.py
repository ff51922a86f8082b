"""Calls that only members of a gang may make, made from a client pod; and what one must know to try them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import grpc

from tests.cluster.kubectl import Object
from tests.e2e.support import intruder, pod_processes
from tests.e2e.support.clients import Client
from tests.e2e.support.models import DeployedModel
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_operator import names

CONTROL = {"gang": names.CONTROL_PORT}
FIXED_PORTS = {
    names.INFERENCE_PORT,
    names.HTTP_PORT,
    names.CONTROL_PORT,
    names.HEALTH_PORT,
    names.METRICS_PORT,
}


def intrude(
    client: Client, pod: Object, ports: Mapping[str, int], token: str | None, *, attempt: int
) -> dict[str, str]:
    """What became of each call: "OK" or status code and details. See intruder.py for ports and token."""
    given = {"address": pod["status"]["podIP"], "ports": ports, "token": token, "attempt": attempt}
    command = ["exec", "--stdin", client.name, "--", "python3", "-", json.dumps(given)]
    return json.loads(client.kubectl.run(*command, standard_input=Path(intruder.__file__).read_text()))


def inner_ports(pod: Object) -> dict[str, int]:
    """The ports of a worker pod's supervisor and rank, which they choose at random; of the local cluster."""
    (supervisor,) = pod_processes.listening_ports(pod_processes.first_of(pod, names.CONTAINER)) - FIXED_PORTS
    (rank,) = [process.port for process in status_of(pod).processes if process.name.startswith("rank ")]
    return {"supervisor": supervisor, "rank": rank}


def status_of(pod: Object) -> worker_pb2.GangStatusResponse:
    """What the pod's supervisor knows of itself and the gang; of the local cluster."""
    with grpc.insecure_channel(f"{pod['status']['podIP']}:{names.HEALTH_PORT}") as channel:
        stub = worker_pb2_grpc.StatusServiceStub(channel)
        return stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=10, wait_for_ready=True)


def token_of(model: DeployedModel, gang: str) -> str:
    """The gang's secret: only whoever may read Secrets can know it."""
    secret = model.kubectl.get("secret", names.token_secret(gang))
    return base64.b64decode(secret["data"][names.TOKEN_KEY]).decode()

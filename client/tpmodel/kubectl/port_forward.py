"""`kubectl tpmodel port-forward`: a model's client ports on this machine, also when its gang or pod changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

import click

from tpmodel.kubectl.connection import connection_options
from tpmodel.kubectl.forward import forwarding
from tpmodel.kubectl.interrupts import until_interrupted
from tpmodel.kubectl.kubectl import Kubectl, with_kubectl
from tpmodel.kubectl.lookup import Leader, find_leader
from tpmodel.kubectl.names import HTTP_PORT, INFERENCE_PORT
from tpmodel.kubectl.pods import PodView
from tpmodel.kubectl.problems import KubectlError

RETRY_SECONDS = 2.0
LOOK_SECONDS = 2.0
_PORT = click.IntRange(0, 65535)


@click.command("port-forward")
@click.argument("model")
@click.option("--gang", default=None, metavar="N", help="This gang; default: the first that takes requests.")
@click.option("--port", type=_PORT, default=INFERENCE_PORT, show_default=True, help="gRPC, here; 0: any free.")
@click.option("--http-port", type=_PORT, default=HTTP_PORT, show_default=True, help="HTTP, here; 0: any free.")
@connection_options
@with_kubectl
def port_forward(kubectl: Kubectl, model: str, gang: str | None, port: int, http_port: int) -> None:
    """Make MODEL reachable at ports of this machine, until Ctrl-C.

    All connections go to one gang's leader pod. When that goes away, the next one that takes requests is found.
    """
    with until_interrupted():
        keep_forwarding(
            kubectl, lambda: find_leader(kubectl, model, gang), {INFERENCE_PORT: port, HTTP_PORT: http_port}
        )


def keep_forwarding(
    kubectl: Kubectl, find: Callable[[], Leader], ports: dict[int, int], sleep: Callable[[float], None] = time.sleep
) -> NoReturn:
    """One leader pod after the other, as they come and go. The first must be there.

    Args:
        kubectl: for the cluster.
        find: a leader pod that takes requests now; KubectlError: there is none.
        ports: those here, by the pod's; 0: any free one.
        sleep: waits between two looks.
    """
    leader = find()
    while True:
        ports, words = _forward(kubectl, leader, ports)
        click.echo(f"{leader.described} is gone ({words}): looking for a gang that takes requests", err=True)
        leader = next_leader(find, sleep)


def _forward(kubectl: Kubectl, leader: Leader, ports: dict[int, int]) -> tuple[dict[int, int], str]:
    """Until the pod goes away; the ports here, which clients know by now, and kubectl's last words."""
    with forwarding(kubectl, leader.pod.name, ports) as forward:
        found = {remote: forward.local_port(remote) for remote in ports}
        scheme = "https" if leader.pod.tls else "http"
        click.echo(
            f"127.0.0.1:{found[INFERENCE_PORT]} (gRPC) and {scheme}://127.0.0.1:{found[HTTP_PORT]} lead to "
            f"{leader.described}"
        )
        # kubectl itself notices that a pod is gone only when somebody connects.
        while not (words := forward.wait(LOOK_SECONDS)) and is_there(kubectl, leader.pod):
            pass
        return found, words or "its pod has been deleted"


def is_there(kubectl: Kubectl, pod: PodView) -> bool:
    """Whether the pod exists, as far as one can tell. One that is ending still serves its streams."""
    try:
        return kubectl.get("pods", pod.name)["metadata"]["uid"] == pod.uid
    except KubectlError as error:
        return not error.not_found


def next_leader(find: Callable[[], Leader], sleep: Callable[[float], None]) -> Leader:
    """Asks until there is one; says why there is none whenever the reason changes."""
    said = ""
    while True:
        sleep(RETRY_SECONDS)
        try:
            return find()
        except KubectlError as error:
            if error.message != said:
                said = error.message
                click.echo(said, err=True)

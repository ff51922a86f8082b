"""Mode InPlace: what is lost of a gang is replaced, all else stays as it is, streams go on, and no attempt is spent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster import pods
from tests.cluster.faults import Faults
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.local import LocalCluster
from tests.cluster.target import Target
from tests.e2e.support import long_answers
from tests.e2e.support.clients import Client
from tests.e2e.support.gang_calls import status_of
from tests.e2e.support.models import DeployedModel, deployed, node_of
from tests.e2e.support.operators import kill_leader
from tests.e2e.support.release import Release
from tests.e2e.support.restarts import STURDY, Before, ask
from tests.e2e.support.timings import Stopwatch, Timings
from tpmodel_operator import names

EPOCHS_OF_AN_ATTEMPT = 32
"""Bits: the attempt is above them."""
STREAMS = 2
REBUILD_SECONDS = 180.0
"""For a new world on two busy cores; where a pod is made again it imports torch and loads first."""


@pytest.fixture(scope="module", params=(1, 2), ids=("one_pod_of_two_ranks", "two_pods_of_one_rank"))
def in_place_model(request: pytest.FixtureRequest, target: Target, models: Kubectl) -> Iterator[DeployedModel]:
    """In both shapes: ranks that share memory, and ranks that talk over Gloo."""
    long_answers.place(target)
    spec = STURDY | {
        "model": {"uri": long_answers.URI},
        "ranksPerPod": 2 // request.param,
        "recovery": STURDY["recovery"] | {"mode": "InPlace"},
    }
    with deployed(models, f"in-place-{request.param}", **spec) as model:
        yield model


@pytest.fixture
def model(in_place_model: DeployedModel) -> DeployedModel:
    """The same, when it is Ready."""
    in_place_model.wait_ready()
    return in_place_model


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A process that is killed by SIGKILL."""

    what: str
    process: str
    """As the kernel names it, or what its command line has."""
    of_last_pod: bool = False
    cuts_streams: bool = False
    """Whether clients lose their streams, and resume them."""


KILLS = (
    Kill(what="rank 0", process="tpmodel-rank0"),
    Kill(what="rank 1", process="tpmodel-rank1", of_last_pod=True),
    Kill(what="engine", process="tpmodel_worker.engine", cuts_streams=True),
)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.what.replace(" ", "_"))
def test_a_killed_process_costs_no_pod_and_no_attempt_and_streams_go_on(
    model: DeployedModel, client: Client, timings: Timings, kill: Kill
) -> None:
    before = Before.of(model)
    answer = ask(model, client)
    epoch = epoch_of(before.leader)

    with client.load(service_of(model), streams=STREAMS, tokens=tokens_of_a_stream(model)) as load:
        load.wait_begun(STREAMS)
        clock = Stopwatch()
        kill_process(before, kill)
        model.until(lambda: epoch_of(before.leader) > epoch, what="a new world", seconds=REBUILD_SECONDS, interval=0.2)
        timings.note(f"in place: {kill.what} killed", "a new world", clock.seconds)
        load.wait_begun(len(load.begun()) + 1, seconds=REBUILD_SECONDS)
    errors = [line for line in load.failures() if line.get("error") or "event" not in line]
    assert errors == []
    assert kill.cuts_streams or load.failures() == []
    before.check_untouched()
    assert ask(model, client) == answer
    assert containers_restarted(model) == 0
    wait_shown(before, epoch)


def test_what_happens_while_the_operator_is_down_is_rebuilt_all_the_same(
    model: DeployedModel, client: Client, installed: Release
) -> None:
    before = Before.of(model)
    answer = ask(model, client)
    epoch = epoch_of(before.leader)
    kill_leader(installed)
    kill_process(before, KILLS[1])
    model.until(lambda: epoch_of(before.leader) > epoch, what="a new world", seconds=REBUILD_SECONDS, interval=0.2)
    assert ask(model, client) == answer
    before.check_untouched()


def test_an_annotation_asks_for_a_new_world_once(model: DeployedModel, client: Client) -> None:
    """W26: the request comes with the gang's ConfigMap, which kubelets look at about once a minute."""
    before = Before.of(model)
    answer = ask(model, client)
    epoch = epoch_of(before.leader)
    model.kubectl.run("annotate", f"tpmodel/{model.name}", f"{names.REBUILD_ANNOTATION}={epoch}", "--overwrite")
    model.until(lambda: epoch_of(before.leader) > epoch, what="a new world", seconds=REBUILD_SECONDS)
    model.until(lambda: epoch_of(before.leader) == epoch + 1, what="only one", seconds=REBUILD_SECONDS)
    model.wait_events("RebuildRequested", saying=str(epoch))
    assert ask(model, client) == answer
    before.check_untouched()


@pytest.mark.parametrize("index", [0, -1], ids=("leader_pod", "last_pod"))
def test_a_deleted_pod_is_made_again_alone_under_the_same_attempt(
    model: DeployedModel, client: Client, timings: Timings, index: int
) -> None:
    before = Before.of(model)
    answer = ask(model, client)
    pod = before.pods[index]
    clock = Stopwatch()
    model.kubectl.delete("pod", pod["metadata"]["name"], wait=False)
    wait_replaced(before, pod)
    timings.note(f"in place: pod {pod['metadata']['name'][-1]} deleted", "Ready", clock.seconds)
    assert ask(model, client) == answer


def test_a_lost_node_costs_its_pods_and_no_attempt(
    model: DeployedModel, client: Client, faults: Faults, cluster: LocalCluster, timings: Timings
) -> None:
    before = Before.of(model)
    answer = ask(model, client)
    mine = node_of(client.kubectl.get("pod", client.name))
    pod = next((pod for pod in reversed(before.pods) if node_of(pod) != mine), None)
    if pod is None:
        # The only pod is on the client's node: elsewhere the client would be lost with it.
        model.kubectl.run("cordon", mine)
        model.kubectl.delete("pod", before.leader["metadata"]["name"])
        wait_replaced(before, before.leader)
        model.kubectl.run("uncordon", mine)
        before = Before.of(model)
        pod = before.leader
    clock = Stopwatch()
    faults.power_off(node_of(pod))
    wait_replaced(before, pod, and_others_of=node_of(pod))
    timings.note("in place: node powered off", "Ready", clock.seconds)
    assert ask(model, client) == answer
    faults.bring_back(node_of(pod))


# --------------------------------------------------------------------------------------------------------- helpers


def tokens_of_a_stream(model: DeployedModel) -> int:
    """It lasts for seconds, so that it is cut in its middle: Gloo between pods on few cores is slow."""
    return 200 if len(model.pods()) == 1 else 80


def service_of(model: DeployedModel) -> str:
    return f"{model.name}.{model.kubectl.namespace}.svc:{names.INFERENCE_PORT}"


def epoch_of(leader: Object) -> int:
    """Of the world that serves; 0 while none does."""
    engine = status_of(leader).engine
    return engine.epoch if engine.ready_ranks == engine.world_size > 0 else 0


def kill_process(before: Before, kill: Kill) -> None:
    kubectl = before.model.kubectl
    pod = before.pods[-1 if kill.of_last_pod else 0]["metadata"]["name"]
    running = pods.processes(kubectl, pod, container=names.CONTAINER)
    (process,) = (one for one in running if one.name == kill.process or kill.process in one.command.split())
    pods.kill(kubectl, pod, process, container=names.CONTAINER)


def containers_restarted(model: DeployedModel) -> int:
    return sum(status["restartCount"] for pod in model.pods() for status in pod["status"]["containerStatuses"])


def wait_shown(before: Before, epoch: int) -> None:
    """TPModel status shows the new epoch and what happened, under the same attempt."""
    model = before.model

    def shown() -> Object | None:
        gang = model.gang(before.gang["name"])
        return gang if gang["epoch"] > epoch and gang.get("rebuilds") else None

    gang = model.until(shown, what="the rebuild in status", seconds=60)
    assert gang["attempt"] == gang["epoch"] >> EPOCHS_OF_AN_ATTEMPT == before.attempt
    assert gang["restartsTotal"] == before.gang["restartsTotal"]
    model.wait_events("GangRebuilt")


def wait_replaced(before: Before, pod: Object, *, and_others_of: str = "") -> None:
    """The gang is Ready again with another pod in this one's place; the others are the same, and so is the attempt."""
    model, gone = before.model, {pod["metadata"]["uid"]}
    gone |= {other["metadata"]["uid"] for other in before.pods if node_of(other) == and_others_of}
    kept = before.uids - gone

    def replaced() -> bool:
        uids = model.uids()
        return not uids & gone and len(uids) == len(before.uids) and bool(model.gang(before.gang["name"])["ready"])

    model.until(replaced, what="Ready with a new pod", seconds=REBUILD_SECONDS)
    gang = model.gang(before.gang["name"])
    assert kept <= model.uids(), model.explain()
    assert (gang["attempt"], gang["restartsTotal"]) == (before.attempt, before.gang["restartsTotal"]), model.explain()

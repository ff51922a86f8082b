"""Live weight updates in a cluster: a trainer's Job finds all gangs, and what is lost is never the checkpoint."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.local import LocalCluster
from tests.cluster.target import Target
from tests.e2e.support import caches, long_answers, trainers
from tests.e2e.support.clients import Client
from tests.e2e.support.gang_calls import status_of
from tests.e2e.support.models import DeployedModel, deployed, gang_of, is_ready
from tests.e2e.support.restarts import STURDY
from tests.e2e.support.timings import Stopwatch, Timings
from tests.e2e.support.trainers import Tuned
from tpmodel.trainer import connect
from tpmodel_operator import names

TOKENS = 20_000
"""More than an update lasts."""
STREAMS = 4
NODE = "node2"
"""That has the disk of the gang that keeps its updates."""
LOST_SECONDS = 180.0
"""For pods that are made again, import torch and load, on two busy cores."""


@pytest.fixture(scope="module")
def first(target: Target) -> Tuned:
    return trainers.tuned(target, 1)


@pytest.fixture(scope="module")
def second(target: Target) -> Tuned:
    return trainers.tuned(target, 2)


@pytest.fixture(scope="module")
def model(target: Target, models: Kubectl) -> Iterator[DeployedModel]:
    """Two gangs of two pods."""
    long_answers.place(target)
    trainers.prepare(models)
    given = STURDY | trainers.spec() | {"replicas": 2, "recovery": STURDY["recovery"] | {"mode": "InPlace"}}
    with deployed(models, "updated", **given) as model:
        yield model


def test_a_trainers_job_updates_one_gang_after_the_other_while_clients_stream(
    model: DeployedModel, target: Target, client: Client, first: Tuned, timings: Timings
) -> None:
    before = [trainers.answer_of(leader) for leader in model.leaders()]
    with client.load_on_all(model.leaders(), model.url, streams=STREAMS, tokens=TOKENS) as load:
        clock = Stopwatch()
        said = trainers.send(model, target, first, 1, gangs="one_by_one")
        timings.note("weights: Job of a trainer created", "both gangs updated", clock.seconds)
        load.stop()
    assert load.failures() == []
    assert said.count("serves version 1") == 2, said
    wait_served(model, 1)
    after = [trainers.answer_of(leader) for leader in model.leaders()]
    assert len(after) == 2
    assert all(first.made(tokens) for tokens in after)
    assert not any(first.made(tokens) for tokens in before)
    for gang in model.gangs():
        assert gang["weightsVersion"] == 1
        model.until(
            lambda gang=gang: versions_told(model, gang) == "1", what="the version in its ConfigMap", seconds=30
        )
    assert len(model.wait_events("WeightsCommitted", 2)) == 2
    assert model.condition("WeightsReady")["status"] == "True"
    assert model.kubectl.run("get", "tpm", model.name, "--output=jsonpath={.status.weightsVersion}") == "1"


def test_a_gang_whose_pods_were_all_lost_copies_the_weights_of_the_other_gang(
    model: DeployedModel, first: Tuned, timings: Timings
) -> None:
    if model.status().get("weightsVersion") != 1:
        pytest.fail("the test before has left no version 1 behind")
    lost, serving = (gang["name"] for gang in model.gangs())
    pods = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in model.pods(lost)}
    kept = {pod["metadata"]["uid"] for pod in model.pods(serving)}
    clock = Stopwatch()
    for name in pods.values():
        model.kubectl.delete("pod", name, wait=False)
    model.until(
        lambda: not pods.keys() & model.uids() and len(model.leaders()) == 2,
        what="both gangs Ready again",
        seconds=LOST_SECONDS,
    )
    timings.note("weights: all pods of one gang of two deleted", "Ready with the other's weights", clock.seconds)
    wait_served(model, 1)
    assert all(first.made(trainers.answer_of(leader)) for leader in model.leaders())
    assert kept <= model.uids()
    assert [gang["restartsTotal"] for gang in model.gangs()] == [0, 0], model.explain()


def test_pods_that_are_made_again_wait_for_the_trainer_and_serve_no_checkpoint_meanwhile(
    model: DeployedModel, target: Target, second: Tuned, timings: Timings
) -> None:
    """One gang loses a rank's part of the weights with its pod, the other one loses all its pods."""
    if model.status().get("weightsVersion") != 1:
        pytest.fail("the test before has left no version 1 behind")
    part, whole = (gang["name"] for gang in model.gangs())
    lost = [model.pods(part)[1], *model.pods(whole)]
    clock = Stopwatch()
    for pod in lost:
        model.kubectl.delete("pod", pod["metadata"]["name"], wait=False)
    model.until(lambda: all_lost(model), what="WeightsLost of both gangs", seconds=LOST_SECONDS)
    timings.note("weights: pods of both gangs deleted", "WeightsLost is in status", clock.seconds)

    assert not {pod["metadata"]["uid"] for pod in lost} & model.uids()
    assert not model.leaders()
    model.until(lambda: not trainers.published(model, names.leaders_service(model.name)), what="no clients", seconds=30)
    trainable = names.trainers_service(model.name)
    model.until(lambda: len(trainers.published(model, trainable)) == 2, what="both open to trainers", seconds=30)
    assert "weightsVersion" not in model.status()
    assert names.RESET_WEIGHTS_ANNOTATION in model.condition("WeightsReady")["message"]
    assert {gang_of_event(event) for event in model.wait_events("WeightsLost", 2)} == {part, whole}

    trainers.send(model, target, second, 2, gangs="all_at_once")
    wait_served(model, 2)
    model.wait_ready()
    assert all(second.made(trainers.answer_of(leader)) for leader in model.leaders())
    assert [gang["restartsTotal"] for gang in model.gangs()] == [0, 0], model.explain()


def test_with_persisted_updates_a_gang_whose_pods_were_all_lost_comes_back_with_its_weights(
    models: Kubectl, target: Target, cluster: LocalCluster, first: Tuned, timings: Timings
) -> None:
    trainers.prepare(models)
    claim = caches.create(models, cluster.node(NODE), f"updates-{uuid.uuid4().hex[:8]}")
    given = STURDY | trainers.spec() | {"ranksPerPod": 2, "weightUpdates": {"persistUpdates": f"pvc://{claim}/sets"}}
    given["recovery"] = STURDY["recovery"] | {"mode": "InPlace"}
    with deployed(models, "kept", **given) as model:
        (pod,) = model.pods()
        # Over the pod's address, as a trainer outside of pods does.
        with connect(f"{pod['status']['podIP']}:{names.CONTROL_PORT}", token=trainers.TOKEN) as trainer:
            trainer.send_weights(first.weights, version=1)
        wait_served(model, 1)
        model.until(lambda: status_of(pod).engine.persisted_version == 1, what="weights on the disk", seconds=60)
        clock = Stopwatch()
        model.kubectl.delete("pod", pod["metadata"]["name"], wait=False)
        model.until(
            lambda: pod["metadata"]["uid"] not in model.uids() and model.leaders(),
            what="Ready again",
            seconds=LOST_SECONDS,
        )
        timings.note("weights: all pods deleted, persistUpdates", "Ready at its version", clock.seconds)
        wait_served(model, 1)
        (leader,) = model.leaders()
        assert first.made(trainers.answer_of(leader))
        assert not model.events("WeightsLost")
    models.delete("pvc", claim, wait=False)


# --------------------------------------------------------------------------------------------------- helpers


def wait_served(model: DeployedModel, version: int) -> None:
    """Status says that all gangs serve it; the operator asks them every 10 s."""
    model.until(lambda: model.status().get("weightsVersion") == version, what=f"version {version}", seconds=60)


def all_lost(model: DeployedModel) -> bool:
    gangs = model.gangs()
    pods = model.pods()
    return (
        [gang.get("weightsCondition") for gang in gangs] == ["WeightsLost"] * 2
        and len({gang_of(pod) for pod in pods}) == 2
        and not any(is_ready(pod) for pod in pods if pod["metadata"]["labels"][names.POD_INDEX] == "0")
    )


def versions_told(model: DeployedModel, gang: Object) -> str:
    """What the gang's pods read when they start."""
    item = model.kubectl.get("configmap", names.attempt_config_map(gang["name"]))
    return item["data"].get(names.WEIGHTS_VERSION_KEY, "")


def gang_of_event(event: Object) -> str:
    return event["message"].removeprefix("gang ").partition(":")[0]

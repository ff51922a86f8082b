"""Live weight updates in a cluster: a trainer's Job finds all gangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.target import Target
from tests.e2e.support import long_answers, trainers
from tests.e2e.support.clients import Client
from tests.e2e.support.models import DeployedModel, deployed
from tests.e2e.support.restarts import STURDY
from tests.e2e.support.timings import Stopwatch, Timings
from tests.e2e.support.trainers import Tuned
from tpmodel_operator import names

TOKENS = 20_000
"""More than an update lasts."""
STREAMS = 4


@pytest.fixture(scope="module")
def first(target: Target) -> Tuned:
    return trainers.tuned(target, 1)


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
        assert versions_told(model, gang) == "1"
    told = [event["message"] for event in model.events("WeightsCommitted")]
    assert len(told) == 2, told
    assert model.condition("WeightsReady")["status"] == "True"
    assert model.kubectl.run("get", "tpm", model.name, "--output=jsonpath={.status.weightsVersion}") == "1"


# --------------------------------------------------------------------------------------------------- helpers


def wait_served(model: DeployedModel, version: int) -> None:
    """Status says that all gangs serve it; the operator asks them every 10 s."""
    model.until(lambda: model.status().get("weightsVersion") == version, what=f"version {version}", seconds=60)


def versions_told(model: DeployedModel, gang: Object) -> str:
    """What the gang's pods read when they start."""
    item = model.kubectl.get("configmap", names.attempt_config_map(gang["name"]))
    return item["data"].get(names.WEIGHTS_VERSION_KEY, "")

"""From `kubectl apply` of a TPModel to tokens, and what `kubectl` shows of it."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import pytest

from tests.cluster.kubectl import Kubectl, KubectlError, Object
from tests.e2e.support import reference
from tests.e2e.support.clients import Client
from tests.e2e.support.models import DeployedModel, deployed

MODEL = "first"


@pytest.fixture(scope="module")
def first(models: Kubectl) -> Iterator[DeployedModel]:
    with deployed(models, MODEL) as model:
        yield model


def test_a_gang_of_two_pods_answers_through_its_service_with_the_tokens_of_tpmodel_serve(
    first: DeployedModel, client: Client
) -> None:
    prompts = reference.prompts(4)
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    expected = reference.local_answers(prompts, **options)
    assert len(first.pods()) == 2
    assert client.complete(first.url, prompts, **options) == expected
    # The other Service, for clients that do not balance.
    assert client.complete(f"{MODEL}.{first.kubectl.namespace}.svc:9000", prompts, **options) == expected


def test_pods_run_in_a_namespace_that_enforces_restricted_and_have_no_token_of_the_api(first: DeployedModel) -> None:
    labels = first.kubectl.get("namespace", str(first.kubectl.namespace))["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in first.pods():
        assert pod["spec"]["serviceAccountName"] == MODEL
        assert [volume for volume in pod["spec"]["volumes"] if "projected" in volume] == []
        identity = first.kubectl.execute(pod["metadata"]["name"], "id", "--user")
        assert identity.strip() == "1000"


def test_columns_tell_how_it_stands(first: DeployedModel) -> None:
    header, line = (part.split() for part in first.kubectl.run("get", "tpm", MODEL).splitlines())
    assert header == ["NAME", "MODEL", "TP", "READY", "STATUS", "RESTARTS", "URL", "AGE"]
    shown = dict(zip(header, line, strict=True))
    del shown["AGE"]
    assert shown == {
        "NAME": MODEL,
        "MODEL": "pvc://models/default_model",
        "TP": "2",
        "READY": "1/1",
        "STATUS": "Ready",
        "RESTARTS": "0",
        "URL": f"dns:///{MODEL}-leaders.{first.kubectl.namespace}.svc:9000",
    }


def test_explain_tells_what_a_field_means(first: DeployedModel) -> None:
    explained = first.kubectl.run("explain", "tpmodel.spec.ranksPerPod")
    assert "FIELD: ranksPerPod <integer>" in explained
    assert "GPUs of one host belong in one pod" in " ".join(explained.split())


def test_wait_returns_for_conditions_that_hold_and_not_for_others(first: DeployedModel) -> None:
    first.kubectl.wait("tpm", MODEL, "condition=Ready", seconds=5)
    first.kubectl.wait("tpm", MODEL, "condition=Stalled=false", seconds=5)
    with pytest.raises(KubectlError, match="timed out waiting for the condition on tpmodels/first"):
        first.kubectl.wait("tpm", MODEL, "condition=Degraded", seconds=2)


def test_status_names_every_pod_of_the_gang(first: DeployedModel) -> None:
    # The operator asks the leader for its account every 10 s, and a gang is ready before its last pod is.
    gang = first.until(lambda: complete(first.gang()), what="2 ranks, and every pod ready", seconds=30)
    assert {(pod["name"], pod["uid"]) for pod in gang["pods"]} == {
        (pod["metadata"]["name"], pod["metadata"]["uid"]) for pod in first.pods()
    }
    assert (gang["attempt"], gang["phase"], gang["loadPercent"], gang.get("lastRestart")) == (1, "Serving", 100, None)
    assert gang["epoch"] >> 32 == 1


def complete(gang: Object) -> Object | None:
    """The gang, if all of it is reported to be there."""
    return gang if gang["readyRanks"] == 2 and all(pod["ready"] for pod in gang["pods"]) else None


def test_each_transition_is_told_by_one_event(first: DeployedModel) -> None:
    first.wait_events("Ready")
    reasons = collections.Counter(event["reason"] for event in first.events())
    assert {reason: reasons[reason] for reason in ("GangCreated", "GangReady", "Ready")} == {
        "GangCreated": 1,
        "GangReady": 1,
        "Ready": 1,
    }
    assert all(event.get("count", 1) == 1 for event in first.events())

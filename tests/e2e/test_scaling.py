"""More gangs and fewer: requests spread over all of them, clients find new ones, no stream is lost with an old one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from support.scale import E2E_REQUESTS, E2E_STREAM_SECONDS
from tests.cluster.kubectl import Kubectl
from tests.cluster.target import Target
from tests.e2e.support import custom_metrics, long_answers, reference
from tests.e2e.support.clients import Client
from tests.e2e.support.models import DeployedModel, condition, deployed, gang_of, is_terminating

MODEL = "scaled"
STREAM_TOKENS = 30_000
"""More than a stream's time is enough for."""
FOUND_SECONDS = 60.0
"""Servers end connections after 30 s, plus or minus a tenth, and clients look names up again after 5 s at least."""
AUTOSCALER_SECONDS = 60.0
"""It looks every 5 s in the test cluster, every 15 s by default, and takes a few looks to trust a new metric."""


@pytest.fixture(scope="module")
def scaled(target: Target, models: Kubectl) -> Iterator[DeployedModel]:
    long_answers.place(target)
    with deployed(models, MODEL, model={"uri": long_answers.URI}) as model:
        yield model


def test_a_running_client_finds_a_new_gang(scaled: DeployedModel, client: Client) -> None:
    with client.load(scaled.url, streams=1, tokens=2, pause=0.2) as load:
        scaled.scale(2)
        scaled.wait_ready()
        assert scaled.kubectl.run("get", "tpm", MODEL, "--output=jsonpath={.status.ready}") == "2/2"
        new = next(leader for leader in scaled.leaders() if gang_of(leader) == scaled.gangs()[1]["name"])
        ready = datetime.fromisoformat(condition(new["status"], "Ready")["lastTransitionTime"]).timestamp()
        scaled.until(
            lambda: client.answered(new),
            what="a request of the running client on the new gang",
            seconds=ready + FOUND_SECONDS - time.time(),
        )
        print(f"found {time.time() - ready:.0f} s after it was ready")
        load.stop()
    assert load.failures() == []


def test_requests_of_one_client_are_spread_over_both_gangs(scaled: DeployedModel, client: Client) -> None:
    leaders = scaled.leaders()
    assert len(leaders) == 2
    before = [client.answered(leader) for leader in leaders]
    client.complete(scaled.url, reference.prompts(E2E_REQUESTS), max_tokens=2, ignore_eos=True)
    served = [client.answered(leader) - count for leader, count in zip(leaders, before, strict=True)]
    assert sum(served) == E2E_REQUESTS
    assert min(served) >= 0.35 * E2E_REQUESTS, served


def test_scaling_down_fails_no_stream(scaled: DeployedModel, client: Client) -> None:
    with client.load_on_all(
        scaled.leaders(), scaled.url, streams=4, tokens=STREAM_TOKENS, seconds=E2E_STREAM_SECONDS
    ) as load:
        doomed = next(leader for leader in scaled.leaders() if gang_of(leader) == scaled.gangs()[1]["name"])
        scaled.scale(1)
        scaled.until(lambda: is_terminating(scaled.pods(gang_of(doomed))[0]), what="a gang that ends", seconds=30)
        began_to_end = time.time()
        scaled.wait_ready()
        assert scaled.pods(gang_of(doomed)) == []
        load.stop()
    assert load.failures() == []
    lasted = load.running_at(began_to_end)
    assert len(lasted) == 4
    assert min(lasted) >= E2E_STREAM_SECONDS


def test_an_autoscaler_at_twice_its_target_wants_four_gangs_of_two(
    scaled: DeployedModel, models: Kubectl, target: Target
) -> None:
    scaled.scale(2)
    scaled.wait_ready()
    with custom_metrics.served(target.kubectl, target.operator_image, value=20) as metrics:
        models.apply(autoscaler(target_value=10))
        try:
            # From the two leader pods: were the other pods counted too, it would want twice as many.
            scaled.until(lambda: scaled.get()["spec"]["replicas"] > 2, what="scaled up", seconds=AUTOSCALER_SECONDS)
            metrics.set(10)
            assert scaled.get()["spec"]["replicas"] == 4
            scaled.until(lambda: len(scaled.gangs()) == 4, what="four gangs", seconds=30)
            # The new ones are ready at the target, so it wants no more of them.
            scaled.wait_ready()
            assert models.get("hpa", MODEL)["status"]["desiredReplicas"] == 4
            assert scaled.get()["spec"]["replicas"] == 4
        finally:
            models.delete("hpa", MODEL)
            scaled.scale(1)


def autoscaler(*, target_value: int) -> dict[str, object]:
    metric = {"metric": {"name": "requests"}, "target": {"type": "AverageValue", "averageValue": str(target_value)}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": MODEL},
        "spec": {
            "scaleTargetRef": {"apiVersion": "tpmodel.dev/v1alpha1", "kind": "TPModel", "name": MODEL},
            "minReplicas": 1,
            "maxReplicas": 16,
            "metrics": [{"type": "Pods", "pods": metric}],
        },
    }

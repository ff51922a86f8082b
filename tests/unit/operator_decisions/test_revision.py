"""The hash in a gang's name: what it covers, and what never moves it."""

import pytest
from pydantic import Field, create_model

from support.operator_cluster import spec_with
from tpmodel_operator.api import TPModelSpec
from tpmodel_operator.revision import revision

IMAGE = "registry.example/worker:1"


def hashed(**changes: object) -> str:
    return revision(spec_with(**changes), IMAGE)


@pytest.mark.parametrize(
    "change",
    [
        {"replicas": 7},
        {"rollout": {"maxUnavailable": 0, "maxSurge": 2}},
        {"disruptionBudget": 3},
        {"service": {"type": "LoadBalancer", "port": 80}},
        {"recovery": {"deadline": 60, "maxRestarts": 1, "backoffBase": 1, "backoffLimit": 2, "stabilityWindow": 9}},
        {"recovery": {"formationDeadline": 60}},
        {"image": {"reference": IMAGE}},
        {"resources": {}},
        {"model": {"uri": "hf://organisation/model", "dtype": "auto", "engineOptions": {}}},
        {"scheduling": {"deadNodeToleration": 30}},
    ],
)
def test_it_does_not_move_with_what_pods_do_not_depend_on(change: dict[str, object]):
    assert hashed(**change) == hashed()


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"uri": "hf://organisation/other"}},
        {"model": {"uri": "hf://organisation/model", "engineOptions": {"block_size": "32"}}},
        {"tensorParallelSize": 4},
        {"ranksPerPod": 2},
        {"device": "cuda"},
        {"resources": {"memory": "1Gi"}},
        {"cache": {"type": "pvc", "claimName": "cache"}},
        {"network": {"rdma": True}},
        {"env": [{"name": "A", "value": "1"}]},
        {"scheduling": {"deadNodeToleration": 31}},
        {"recovery": {"progressDeadline": 601}},
        {"recovery": {"mode": "InPlace"}},
        {"drainTimeout": 60},
        {"auth": {"tlsSecretName": "tls"}},
        {"image": {"pullPolicy": "Always"}},
        {"podTemplate": {"labels": {"team": "a"}}},
    ],
)
def test_it_moves_with_what_pods_depend_on(change: dict[str, object]):
    assert hashed(**change) != hashed()


def test_it_moves_with_the_image():
    assert revision(spec_with(), "registry.example/worker:2") != hashed()


def test_ranks_per_pod_written_as_the_default_is_the_default():
    assert hashed(ranksPerPod=1) == hashed(ranksPerPod=None)
    assert hashed(device="cuda", ranksPerPod=2) == hashed(device="cuda", ranksPerPod=None)


def test_the_order_of_keys_does_not_matter():
    assert hashed(scheduling={"nodeSelector": {"a": "1", "b": "2"}}) == hashed(
        scheduling={"nodeSelector": {"b": "2", "a": "1"}}
    )


def test_a_field_that_a_later_operator_adds_with_a_default_moves_nothing():
    later = create_model("Later", __base__=TPModelSpec, something=(str, Field(default="as before")))
    given = spec_with().model_dump(by_alias=True, exclude_defaults=True)
    assert revision(later.model_validate(given), IMAGE) == hashed()


def test_it_can_end_a_name():
    for size in range(1, 60):
        hash5 = hashed(drainTimeout=size)
        assert len(hash5) == 5
        assert set(hash5) <= set("bcdfghjklmnpqrstvwxz2456789")


def test_it_is_the_same_in_every_version():
    """Pinned: if this fails, an upgrade of the operator replaces every gang that exists."""
    assert hashed() == "lzw8x"

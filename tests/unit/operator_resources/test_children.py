"""Services, budget, token, attempt and ServiceAccount."""

from typing import Any

import pytest

from support.operator_objects import GANG, model_with
from tpmodel_operator import names
from tpmodel_operator.actions import EnsureModelChildren
from tpmodel_operator.resources import (
    configmap,
    gang_children,
    model_children,
    pdb,
    secret,
    serviceaccount,
    services,
)
from tpmodel_operator.settings import OperatorSettings

SETTINGS = OperatorSettings(default_image="i")


def ports(service: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {port["name"]: (port["port"], port["targetPort"]) for port in service["spec"]["ports"]}


def test_every_pod_has_a_dns_name_from_its_first_moment():
    service = services.pods(model_with())
    assert service["metadata"]["name"] == "chat-pods"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {names.MODEL_LABEL: "chat"}


def test_clients_that_balance_find_ready_leader_pods_only():
    service = services.leaders(model_with(service={"port": 80, "httpPort": 81}))
    assert service["metadata"]["name"] == "chat-leaders"
    assert service["spec"]["clusterIP"] == "None"
    assert "publishNotReadyAddresses" not in service["spec"]
    assert service["spec"]["selector"] == {names.MODEL_LABEL: "chat", "apps.kubernetes.io/pod-index": "0"}
    assert ports(service) == {"grpc": (9000, 9000), "http": (8000, 8000)}, "a headless Service translates no ports"


def test_trainers_find_every_leader_pod_ready_or_not_where_they_have_a_token():
    model = model_with(auth={"trainerToken": {"name": "t", "key": "k"}})
    service = services.trainers(model)
    assert service in services.build(model)
    assert service["metadata"]["name"] == "chat-trainers"
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert service["spec"]["selector"] == {names.MODEL_LABEL: "chat", "apps.kubernetes.io/pod-index": "0"}
    assert ports(service) == {"control": (9001, 9001)}
    assert [item["metadata"]["name"] for item in services.build(model_with())] == ["chat-pods", "chat-leaders", "chat"]


def test_the_client_service_is_as_the_spec_wants_it():
    wanted = {"type": "LoadBalancer", "port": 80, "httpPort": 81, "annotations": {"lb": "internal"}}
    service = services.client(model_with(service=wanted))
    assert service["metadata"]["name"] == "chat"
    assert service["metadata"]["annotations"] == {"lb": "internal"}
    assert service["spec"]["type"] == "LoadBalancer"
    assert ports(service) == {"grpc": (80, 9000), "http": (81, 8000)}
    assert service["spec"]["selector"] == {names.MODEL_LABEL: "chat", "apps.kubernetes.io/pod-index": "0"}


@pytest.mark.parametrize(
    ("auth", "grpc", "http"), [({}, "kubernetes.io/h2c", "http"), ({"tlsSecretName": "cert"}, "https", "https")]
)
def test_gateways_learn_what_the_ports_speak(auth: dict[str, str], grpc: str, http: str):
    spec = services.client(model_with(auth=auth))["spec"]
    assert {port["name"]: port["appProtocol"] for port in spec["ports"]} == {"grpc": grpc, "http": http}


def test_the_budget_covers_all_pods_and_lets_those_go_that_serve_nobody():
    budget = pdb.build(model_with(), 2)
    assert budget["spec"] == {
        "maxUnavailable": 2,
        "selector": {"matchLabels": {names.MODEL_LABEL: "chat"}},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }


def test_the_token_cannot_be_changed():
    made = secret.build(model_with(), GANG, token="t")
    assert made["metadata"]["name"] == "chat-0-bcdfg-token"
    assert made["stringData"] == {"token": "t"}
    assert made["immutable"] is True


def test_the_attempt_is_text():
    made = configmap.build(model_with(), GANG)
    assert made["metadata"]["name"] == "chat-0-bcdfg-attempt"
    assert made["data"] == {"attempt": "3"}


def test_pods_run_as_an_account_that_may_do_nothing():
    assert serviceaccount.build(model_with())["automountServiceAccountToken"] is False


def test_all_children_are_labelled_and_owned_and_no_two_share_a_name():
    model = model_with()
    made = [
        *model_children(model, EnsureModelChildren(disruptable_pods=1), SETTINGS),
        *gang_children(model, GANG, token="t"),
    ]
    for child in made:
        assert child["metadata"]["namespace"] == "space"
        assert child["metadata"]["labels"][names.MANAGED_BY] == "tpmodel"
        assert child["metadata"]["labels"][names.MODEL_LABEL] == "chat"
        assert [owner["uid"] for owner in child["metadata"]["ownerReferences"]] == ["model-uid"]
    assert len({(child["kind"], child["metadata"]["name"]) for child in made}) == len(made) == 10


def test_without_protection_there_is_no_budget():
    made = model_children(model_with(), EnsureModelChildren(), SETTINGS)
    assert "PodDisruptionBudget" not in {child["kind"] for child in made}

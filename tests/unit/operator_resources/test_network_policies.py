"""Who may connect to which port of a model's pods."""

import pytest

from support.operator_objects import GANG, Source, gang_pod, may_connect, model_with, sibling
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources import networkpolicy
from tpmodel_operator.settings import OperatorSettings

SETTINGS = OperatorSettings(default_image="i", namespace="operators", monitoring_namespaces=("monitoring",))
TARGET = gang_pod(GANG)
CLIENT = Source("apps", {"app": "web"})
NEIGHBOUR = Source("space", {"app": "web"})
OPERATOR = Source("operators", {"app": "tpmodel-operator"})
PROMETHEUS = Source("monitoring", {"app": "prometheus"})

INFERENCE, HTTP, CONTROL, HEALTH, METRICS, RANDOM = 9000, 8000, 9001, 9002, 9003, 43211


def allowed(source: Source, port: int, model: TPModel | None = None) -> bool:
    model = model or model_with()
    gangs = [networkpolicy.build_gang(model, gang) for gang in (GANG, sibling(1))]
    return may_connect([networkpolicy.build(model, SETTINGS), *gangs], source, TARGET, port)


@pytest.mark.parametrize(
    ("source", "ports"),
    [
        (gang_pod(GANG), {INFERENCE, HTTP, CONTROL, HEALTH, METRICS, RANDOM}),
        (gang_pod(sibling(1)), {INFERENCE, HTTP}),
        (gang_pod(GANG, namespace="elsewhere"), {INFERENCE, HTTP}),
        (CLIENT, {INFERENCE, HTTP}),
        (NEIGHBOUR, {INFERENCE, HTTP}),
        (OPERATOR, {INFERENCE, HTTP, HEALTH, METRICS}),
        (PROMETHEUS, {INFERENCE, HTTP, HEALTH, METRICS}),
    ],
    ids=["own gang", "other gang", "same labels elsewhere", "client", "neighbour", "operator", "monitoring"],
)
def test_each_source_reaches_exactly_these_ports(source: Source, ports: set[int]):
    every = {INFERENCE, HTTP, CONTROL, HEALTH, METRICS, RANDOM}
    assert {port for port in every if allowed(source, port)} == ports


def test_service_from_closes_the_client_ports_to_everybody_else():
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "apps"}}}]
    model = model_with(service={"from": peers})
    assert allowed(CLIENT, INFERENCE, model)
    assert allowed(CLIENT, HTTP, model)
    assert not allowed(NEIGHBOUR, INFERENCE, model)
    assert not allowed(OPERATOR, HTTP, model)
    assert allowed(gang_pod(GANG), INFERENCE, model)


def test_trainers_reach_the_control_port_and_the_ports_of_tensors_and_nobody_else_does():
    peers = [{"podSelector": {"matchLabels": {"app": "trainer"}}}]
    model = model_with(auth={"trainerToken": {"name": "t", "key": "k"}}, weightUpdates={"from": peers})
    trainer = Source("space", {"app": "trainer"})
    every = (INFERENCE, HTTP, CONTROL, HEALTH, METRICS, RANDOM, 32767)
    assert {port for port in every if allowed(trainer, port, model)} == {INFERENCE, HTTP, CONTROL, RANDOM}
    assert {port for port in every if allowed(NEIGHBOUR, port, model)} == {INFERENCE, HTTP}
    assert {port for port in every if allowed(trainer, port, model_with())} == {INFERENCE, HTTP}


def test_gangs_that_a_trainer_may_update_reach_each_other_for_copies_of_weights_and_nobody_else_does():
    model = model_with(auth={"trainerToken": {"name": "t", "key": "k"}})
    every = (INFERENCE, HTTP, CONTROL, HEALTH, METRICS, RANDOM, 32767)
    for source, ports in (
        (gang_pod(sibling(1)), {INFERENCE, HTTP, CONTROL, RANDOM}),
        (gang_pod(sibling(1), namespace="elsewhere"), {INFERENCE, HTTP}),
        (NEIGHBOUR, {INFERENCE, HTTP}),
    ):
        assert {port for port in every if allowed(source, port, model)} == ports


def test_only_ingress_is_ruled():
    for policy in (networkpolicy.build(model_with(), SETTINGS), networkpolicy.build_gang(model_with(), GANG)):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        assert "egress" not in policy["spec"]


def test_other_models_are_not_touched():
    model = model_with()
    other = Source("space", {"tpmodel.dev/model": "another"})
    policies = [networkpolicy.build(model, SETTINGS), networkpolicy.build_gang(model, GANG)]
    assert may_connect(policies, CLIENT, other, CONTROL)

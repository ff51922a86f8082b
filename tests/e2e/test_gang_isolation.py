"""Who may speak to the pods of a gang: nobody without its token, and nobody whom its NetworkPolicies leave out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.network_policies import Source, allows
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.local import LocalCluster
from tests.e2e.support.clients import Client
from tests.e2e.support.gang_calls import CONTROL, inner_ports, intrude, token_of
from tests.e2e.support.models import DeployedModel
from tests.e2e.support.release import NAMESPACE as OPERATOR_NAMESPACE
from tests.e2e.support.restarts import Before
from tpmodel_operator import names

WRONG_TOKENS = {"no token": None, "an empty token": "", "another token": "not the gang's"}
SOME_PORT = 40_123
"""Any of those that ranks choose at random."""
CLIENT_PORTS = {names.INFERENCE_PORT, names.HTTP_PORT}
WATCHED_PORTS = {names.METRICS_PORT, names.HEALTH_PORT}
PORTS = CLIENT_PORTS | WATCHED_PORTS | {names.CONTROL_PORT, SOME_PORT}


@pytest.mark.parametrize("presented", WRONG_TOKENS)
def test_the_control_port_refuses_whoever_lacks_the_gangs_token(
    sturdy: DeployedModel, client: Client, presented: str
) -> None:
    before = Before.of(sturdy)
    answers = intrude(client, before.leader, CONTROL, WRONG_TOKENS[presented], attempt=before.attempt + 1)
    assert set(answers) == {"Register", "Drain", "Follow"}
    assert {answer.partition(":")[0] for answer in answers.values()} == {"UNAUTHENTICATED"}, answers
    before.check_untouched()


def test_ranks_and_supervisors_refuse_a_wrong_token(
    sturdy: DeployedModel, client: Client, cluster: LocalCluster
) -> None:
    before = Before.of(sturdy)
    ports = inner_ports(before.worker)
    answers = intrude(client, before.worker, ports, "not the gang's", attempt=before.attempt + 1)
    assert set(answers) == {"Kill", "GetSupervisorStatus", "GetStatus", "Abort", "Session"}
    assert {answer.partition(":")[0] for answer in answers.values()} == {"UNAUTHENTICATED"}, answers
    before.check_untouched()


def test_the_token_alone_admits_no_pod_of_another_attempt(sturdy: DeployedModel, client: Client) -> None:
    before = Before.of(sturdy)
    token = token_of(sturdy, before.gang["name"])
    answers = intrude(client, before.leader, CONTROL, token, attempt=before.attempt - 1)
    assert answers["Register"].startswith("FAILED_PRECONDITION: this engine is of attempt"), answers
    assert answers["Drain"].startswith("FAILED_PRECONDITION"), answers
    assert answers["Follow"] == "OK"
    before.check_untouched()


# ------------------------------------------------------------------------------------------------- NetworkPolicies


def pod_of_gang(model: DeployedModel, **changed: str) -> Source:
    """A pod of the model's namespace, with the labels of its worker pod but for those given."""
    labels = Before.of(model).worker["metadata"]["labels"] | changed
    return Source(pod=labels, namespace=model.kubectl.namespace or "")


def in_namespace(name: str, **labels: str) -> Source:
    """A pod with these labels in a namespace."""
    return Source(pod=labels, namespace=name, namespace_labels={"kubernetes.io/metadata.name": name})


def reachable(policies: list[Object], target: Object, source: Source) -> set[int]:
    """The ports that the policies open for a source."""
    return {port for port in PORTS if allows(policies, target, source, port)}


def policies_of(model: DeployedModel) -> list[Object]:
    """As the API server has them."""
    return model.kubectl.list("networkpolicies", selector=f"{names.MODEL_LABEL}={model.name}")


def test_network_policies_open_each_port_to_those_who_need_it(sturdy: DeployedModel) -> None:
    policies, before = policies_of(sturdy), Before.of(sturdy)
    other_gang = {names.GANG_LABEL: f"{sturdy.name}-1-zzzzz"}
    other_model = {names.GANG_LABEL: "other-0-zzzzz", names.MODEL_LABEL: "other"}
    for target in before.pods:
        assert reachable(policies, target, pod_of_gang(sturdy)) == PORTS
        assert reachable(policies, target, pod_of_gang(sturdy, **other_gang)) == CLIENT_PORTS
        assert reachable(policies, target, pod_of_gang(sturdy, **other_model)) == CLIENT_PORTS
        assert reachable(policies, target, in_namespace("elsewhere", app="web")) == CLIENT_PORTS
        assert reachable(policies, target, Source(address="192.0.2.7")) == CLIENT_PORTS
        assert reachable(policies, target, in_namespace(OPERATOR_NAMESPACE)) == CLIENT_PORTS | WATCHED_PORTS
        # A pod elsewhere that gives itself the gang's labels is none of it.
        impostor = Source(pod=target["metadata"]["labels"], namespace="elsewhere")
        assert reachable(policies, target, impostor) == CLIENT_PORTS


@pytest.fixture
def narrowed(sturdy: DeployedModel) -> Iterator[DeployedModel]:
    """The model, open to clients of one namespace and one range of addresses."""
    clients = [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}},
            "podSelector": {"matchLabels": {"app": "web"}},
        },
        {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}},
    ]
    sturdy.patch({"service": {"from": clients}})
    sturdy.until(lambda: any("ipBlock" in str(policy) for policy in policies_of(sturdy)), what="a new NetworkPolicy")
    yield sturdy
    sturdy.patch({"service": {"from": None}})
    sturdy.until(lambda: "ipBlock" not in str(policies_of(sturdy)), what="the former NetworkPolicy")


def test_service_from_narrows_who_may_send_requests_and_restarts_nothing(narrowed: DeployedModel) -> None:
    policies, before = policies_of(narrowed), Before.of(narrowed)
    target = before.leader
    assert reachable(policies, target, in_namespace("shop", app="web")) == CLIENT_PORTS
    assert reachable(policies, target, in_namespace("shop", app="batch")) == set()
    assert reachable(policies, target, in_namespace("elsewhere", app="web")) == set()
    assert reachable(policies, target, Source(address="192.0.2.7")) == CLIENT_PORTS
    assert reachable(policies, target, Source(address="192.0.2.200")) == set()
    assert reachable(policies, target, pod_of_gang(narrowed)) == PORTS
    before.check_untouched()


def test_pods_of_a_model_are_the_only_ones_that_its_policies_concern(
    sturdy: DeployedModel, models: Kubectl, client: Client
) -> None:
    policies = policies_of(sturdy)
    target = models.get("pod", client.name)
    target["metadata"].setdefault("labels", {})
    assert reachable(policies, target, in_namespace("elsewhere")) == PORTS

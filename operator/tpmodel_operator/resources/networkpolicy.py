"""NetworkPolicies, ingress only: who may open a connection to the pods.

Two kinds, which add up. One per model lets clients and monitoring in. One per gang lets its own pods talk on every
port, since NCCL, Gloo and the rendezvous choose ports at random and know no token: a policy cannot say "of the same
gang" for all gangs at once.
"""

from __future__ import annotations

from typing import Any

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources.objects import Object, gang_metadata, model_metadata, pods_of_gang, pods_of_model
from tpmodel_operator.settings import OperatorSettings

NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""Label that the API server puts on every namespace."""

TENSOR_PORTS: Object = {"port": 32768, "endPort": 65535, "protocol": "TCP"}
"""NCCL and Gloo listen where the kernel has a free port: Linux takes them from 32768 on."""


def build(model: TPModel, settings: OperatorSettings) -> Object:
    """Of a model: clients from anywhere or `service.from`, trainers from `weightUpdates.from` and nowhere else, metrics
    and health from operator and monitoring. Gangs that a trainer may update give each other what one has lost."""
    clients: dict[str, Any] = {"ports": _ports(names.INFERENCE_PORT, names.HTTP_PORT)}
    if model.spec.service.from_:
        clients["from"] = list(model.spec.service.from_)
    senders: list[Object] = []
    if model.spec.auth.trainer_token is not None:
        own = {"podSelector": pods_of_model(model)}
        ports = [*_ports(names.CONTROL_PORT), TENSOR_PORTS]
        senders = [{"ports": ports, "from": [own, *model.spec.weight_updates.from_]}]
    watchers = {"ports": _ports(names.METRICS_PORT, names.HEALTH_PORT), "from": [_namespaces(settings)]}
    return _policy(model_metadata(model, model.name), pods_of_model(model), [clients, *senders, watchers])


def build_gang(model: TPModel, gang: EnsureGang) -> Object:
    """Of a gang: all ports among its pods."""
    among = {"from": [{"podSelector": pods_of_gang(gang)}]}
    return _policy(gang_metadata(model, gang, gang.name), pods_of_gang(gang), [among])


def _policy(metadata: Object, pods: Object, ingress: list[Object]) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {"podSelector": pods, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _namespaces(settings: OperatorSettings) -> Object:
    wanted = sorted({settings.namespace, *settings.monitoring_namespaces})
    return {"namespaceSelector": {"matchExpressions": [{"key": NAMESPACE_NAME, "operator": "In", "values": wanted}]}}


def _ports(*numbers: int) -> list[Object]:
    return [{"port": number, "protocol": "TCP"} for number in numbers]

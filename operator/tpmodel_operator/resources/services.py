"""Services: one that gives every pod its DNS name, two that lead clients to the ready leader pods, one for trainers."""

from __future__ import annotations

from tpmodel_operator import names
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources.objects import Object, leader_pods, model_metadata


def build(model: TPModel) -> list[Object]:
    """All Services of a model."""
    trainers_too = [trainers(model)] if model.spec.auth.trainer_token is not None else []
    return [pods(model), leaders(model), client(model), *trainers_too]


def pods(model: TPModel) -> Object:
    """Headless, with every pod from its first moment: a gang finds its leader before anything is ready."""
    return _service(
        model,
        names.pods_service(model.name),
        {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {names.MODEL_LABEL: model.name},
            "ports": [_port("control", names.CONTROL_PORT, names.CONTROL_PORT)],
        },
    )


def leaders(model: TPModel) -> Object:
    """Headless, ready leader pods only: clients balance over its addresses. It cannot translate ports."""
    return _service(
        model,
        names.leaders_service(model.name),
        {
            "clusterIP": "None",
            "selector": leader_pods(model),
            "ports": _client_ports(model, grpc=names.INFERENCE_PORT, http=names.HTTP_PORT),
        },
    )


def trainers(model: TPModel) -> Object:
    """Headless, every leader pod from its first moment: a gang that serves nothing for want of whole weights is not
    ready, and has to be reached all the same by the full set that mends it."""
    return _service(
        model,
        names.trainers_service(model.name),
        {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": leader_pods(model),
            "ports": [_port("control", names.CONTROL_PORT, names.CONTROL_PORT)],
        },
    )


def client(model: TPModel) -> Object:
    """One address for clients that do not balance."""
    wanted = model.spec.service
    service = _service(
        model,
        names.client_service(model.name),
        {
            "type": wanted.type,
            "selector": leader_pods(model),
            "ports": _client_ports(model, grpc=wanted.port, http=wanted.http_port),
        },
    )
    if wanted.annotations:
        service["metadata"]["annotations"] = dict(wanted.annotations)
    return service


def _service(model: TPModel, name: str, spec: Object) -> Object:
    return {"apiVersion": "v1", "kind": "Service", "metadata": model_metadata(model, name), "spec": spec}


def _client_ports(model: TPModel, *, grpc: int, http: int) -> list[Object]:
    """With the protocol that gateways need to know; under TLS only the client can say what it speaks."""
    encrypted = bool(model.spec.auth.tls_secret_name)
    return [
        _port("grpc", grpc, names.INFERENCE_PORT) | {"appProtocol": "https" if encrypted else "kubernetes.io/h2c"},
        _port("http", http, names.HTTP_PORT) | {"appProtocol": "https" if encrypted else "http"},
    ]


def _port(name: str, port: int, target: int) -> Object:
    return {"name": name, "port": port, "targetPort": target, "protocol": "TCP"}

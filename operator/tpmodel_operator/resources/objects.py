"""What all children have in common: metadata, labels, owner."""

from __future__ import annotations

from typing import Any

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import GROUP, KIND, VERSION, TPModel

Object = dict[str, Any]


def owner(model: TPModel) -> Object:
    """The TPModel owns all its children: they go with it, and no finalizer is needed."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "name": model.name,
        "uid": model.uid,
        "controller": True,
    }


def model_metadata(model: TPModel, name: str) -> Object:
    """Of a child that all gangs share."""
    return {
        "name": name,
        "namespace": model.namespace,
        "labels": names.model_labels(model.name),
        "ownerReferences": [owner(model)],
    }


def gang_metadata(model: TPModel, gang: EnsureGang, name: str) -> Object:
    """Of a child of one gang."""
    return model_metadata(model, name) | {"labels": gang_labels(model, gang)}


def gang_labels(model: TPModel, gang: EnsureGang) -> dict[str, str]:
    """Labels of a gang's objects and pods."""
    return names.gang_labels(model.name, gang.name, gang.index, gang.revision)


def pods_of_model(model: TPModel) -> Object:
    """Selector of all pods of a model."""
    return {"matchLabels": {names.MODEL_LABEL: model.name}}


def pods_of_gang(gang: EnsureGang) -> Object:
    """Selector of all pods of a gang."""
    return {"matchLabels": {names.GANG_LABEL: gang.name}}


def leader_pods(model: TPModel) -> dict[str, str]:
    """Selector of the leader pods of all gangs, as Services write it."""
    return {names.MODEL_LABEL: model.name, names.POD_INDEX: "0"}

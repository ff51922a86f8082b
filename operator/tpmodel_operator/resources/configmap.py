"""ConfigMap with what a gang's pods are told: they have it as files beside each other."""

from __future__ import annotations

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel
from tpmodel_operator.observed import Orders
from tpmodel_operator.resources.objects import Object, gang_metadata


def build(model: TPModel, gang: EnsureGang) -> Object:
    """The ConfigMap of a gang."""
    orders = Orders(
        attempt=gang.attempt,
        rebuild=gang.rebuild,
        model_revision=gang.model_revision,
        weights_version=gang.weights_version,
    )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": gang_metadata(model, gang, names.attempt_config_map(gang.name)),
        "data": data_of(orders),
    }


def data_of(orders: Orders) -> dict[str, str]:
    """The files' contents. The attempt is read once, when a pod starts; what is not said yet has no file."""
    data = {names.ATTEMPT_KEY: str(orders.attempt)}
    if orders.rebuild:
        data[names.REBUILD_KEY] = str(orders.rebuild)
    if orders.model_revision:
        data[names.MODEL_REVISION_KEY] = orders.model_revision
    if orders.weights_version:
        data[names.WEIGHTS_VERSION_KEY] = str(orders.weights_version)
    return data


def orders_of(data: dict[str, str]) -> Orders:
    """The other way round; what somebody has written into it that makes no sense says nothing."""
    return Orders(
        attempt=_number(data.get(names.ATTEMPT_KEY, "")),
        rebuild=_number(data.get(names.REBUILD_KEY, "")),
        model_revision=data.get(names.MODEL_REVISION_KEY, ""),
        weights_version=_number(data.get(names.WEIGHTS_VERSION_KEY, "")),
    )


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else 0

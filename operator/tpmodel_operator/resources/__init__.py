"""Children of a TPModel: one pure builder per kind, which gives the object as server-side apply sends it."""

from __future__ import annotations

from tpmodel_operator.actions import EnsureGang, EnsureModelChildren
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources import configmap, networkpolicy, pdb, secret, serviceaccount, services, statefulset
from tpmodel_operator.resources.objects import Object
from tpmodel_operator.settings import OperatorSettings


def model_children(model: TPModel, wanted: EnsureModelChildren, settings: OperatorSettings) -> list[Object]:
    """What all gangs share, to be applied in this order; the budget is missing where there is to be none."""
    children = [serviceaccount.build(model), *services.build(model), networkpolicy.build(model, settings)]
    if wanted.disruptable_pods is not None:
        children.append(pdb.build(model, wanted.disruptable_pods))
    return children


def gang_children(model: TPModel, gang: EnsureGang, *, token: str) -> list[Object]:
    """What one gang needs, to be created in this order: the StatefulSet last, when all that its pods mount is there."""
    return [
        secret.build(model, gang, token=token),
        configmap.build(model, gang),
        networkpolicy.build_gang(model, gang),
        statefulset.build(model, gang),
    ]

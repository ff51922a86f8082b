"""Where pods may run: affinity and tolerations."""

from __future__ import annotations

import copy

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.resources.objects import Object, pods_of_gang

DEAD_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
_SPREAD_WEIGHT = 50
"""Of 100: a preference that the user's own may outweigh."""


def tolerations(spec: TPModelSpec) -> list[Object]:
    """The user's, and a short one for dead nodes: Kubernetes' own would keep a dead gang for five minutes."""
    return list(spec.scheduling.tolerations) + [
        {
            "key": taint,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": spec.scheduling.dead_node_toleration,
        }
        for taint in DEAD_NODE_TAINTS
    ]


def affinity(model: TPModel, gang: EnsureGang) -> Object | None:
    """The user's, and with a topology key: a gang's pods share its value, the model's gangs rather do not."""
    scheduling = model.spec.scheduling
    if not scheduling.topology_key:
        return scheduling.affinity
    wanted: Object = copy.deepcopy(scheduling.affinity or {})
    together = {"topologyKey": scheduling.topology_key, "labelSelector": pods_of_gang(gang)}
    apart = {"topologyKey": scheduling.topology_key, "labelSelector": _other_gangs(model, gang)}
    required = wanted.setdefault("podAffinity", {}).setdefault("requiredDuringSchedulingIgnoredDuringExecution", [])
    required.append(together)
    preferred = wanted.setdefault("podAntiAffinity", {}).setdefault(
        "preferredDuringSchedulingIgnoredDuringExecution", []
    )
    preferred.append({"weight": _SPREAD_WEIGHT, "podAffinityTerm": apart})
    return wanted


def _other_gangs(model: TPModel, gang: EnsureGang) -> Object:
    return {
        "matchLabels": {names.MODEL_LABEL: model.name},
        "matchExpressions": [{"key": names.GANG_LABEL, "operator": "NotIn", "values": [gang.name]}],
    }

"""The pod template of a gang: all its pods are alike, they tell themselves apart by their index."""

from __future__ import annotations

from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources import container, placement, volumes
from tpmodel_operator.resources.objects import Object, gang_labels

USER = 1000
END_OF_DRAIN_SECONDS = 15
"""What a pod gets beyond drainTimeout to end its processes."""


def template(model: TPModel, gang: EnsureGang) -> Object:
    """Labels and annotations of the user's come first, so that the operator's win."""
    added = model.spec.pod_template
    metadata: Object = {"labels": {**added.labels, **gang_labels(model, gang)}}
    if added.annotations:
        metadata["annotations"] = dict(added.annotations)
    return {"metadata": metadata, "spec": _spec(model, gang)}


def _spec(model: TPModel, gang: EnsureGang) -> Object:
    spec = model.spec
    own_volumes = [mounted.volume for mounted in volumes.mounted(model, gang)]
    sidecars = [_sidecar(sidecar) for sidecar in spec.pod_template.sidecars]
    always: Object = {
        "serviceAccountName": model.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.drain_timeout + END_OF_DRAIN_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": placement.tolerations(spec),
        "containers": [container.build(model, gang)],
        "volumes": [*own_volumes, *spec.pod_template.volumes],
    }
    where_given: Object = {
        "initContainers": sidecars,
        "imagePullSecrets": [{"name": name} for name in spec.image.pull_secrets],
        "nodeSelector": dict(spec.scheduling.node_selector),
        "affinity": placement.affinity(model, gang),
        "priorityClassName": spec.scheduling.priority_class_name,
        "schedulerName": spec.scheduling.scheduler_name,
        "resourceClaims": [
            {"name": claim.name, "resourceClaimTemplateName": claim.resource_claim_template_name}
            for claim in spec.resource_claims
        ],
    }
    return always | {name: value for name, value in where_given.items() if value}


def _sidecar(given: Object) -> Object:
    """Started before the worker and ended after it, so that it sees a drain to its end; without privilege."""
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return given | {"restartPolicy": "Always", "securityContext": given.get("securityContext", {}) | context}

"""StatefulSet of a gang. Its spec is never changed: another revision is another gang."""

from __future__ import annotations

from tpmodel_operator import defaults, names, weights
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources import pod
from tpmodel_operator.resources.objects import Object, gang_metadata, pods_of_gang


def build(model: TPModel, gang: EnsureGang) -> Object:
    """All pods at once; a pod made again takes the one template there ever is; pods keep nothing of their own."""
    metadata = gang_metadata(model, gang, gang.name)
    metadata["annotations"] = {
        names.IMAGE_ANNOTATION: gang.image,
        names.WEIGHTS_SOURCE_ANNOTATION: weights.source(model),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata,
        "spec": {
            "serviceName": names.pods_service(model.name),
            "replicas": defaults.pods_per_gang(model.spec),
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "revisionHistoryLimit": 0,
            "selector": pods_of_gang(gang),
            "template": pod.template(model, gang),
        },
    }

"""PodDisruptionBudget over all pods of a model."""

from __future__ import annotations

from tpmodel_operator.api import TPModel
from tpmodel_operator.resources.objects import Object, model_metadata, pods_of_model


def build(model: TPModel, disruptable_pods: int) -> Object:
    """The budget; how the number of pods follows from one of gangs, see disruption.py.

    A pod that is not Ready serves nobody: it may always be evicted, so that a broken gang never blocks a drain.
    """
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": model_metadata(model, model.name),
        "spec": {
            "maxUnavailable": disruptable_pods,
            "selector": pods_of_model(model),
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }

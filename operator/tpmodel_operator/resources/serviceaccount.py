"""ServiceAccount of the pods: it exists so that they do not run as `default`, and it may do nothing."""

from __future__ import annotations

from tpmodel_operator.api import TPModel
from tpmodel_operator.resources.objects import Object, model_metadata


def build(model: TPModel) -> Object:
    """The ServiceAccount of a model."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": model_metadata(model, model.name),
        "automountServiceAccountToken": False,
    }

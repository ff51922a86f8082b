"""ConfigMap with a gang's attempt, which every pod reads once at its start."""

from __future__ import annotations

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources.objects import Object, gang_metadata


def build(model: TPModel, gang: EnsureGang) -> Object:
    """The ConfigMap of a gang."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": gang_metadata(model, gang, names.attempt_config_map(gang.name)),
        "data": {names.ATTEMPT_KEY: str(gang.attempt)},
    }

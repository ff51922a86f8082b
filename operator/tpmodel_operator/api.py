"""TPModel, as users write it and read it: the one source of the CRD, its defaults, bounds and descriptions.

Python names are snake_case, in YAML they are camelCase. The spec is in api_spec.py and api_model.py, the status in
api_status.py. Rules between fields that the API server can check are CEL, in rules.py; what only the operator can see
is refused by acceptance.py.
"""

from __future__ import annotations

from pydantic import ConfigDict

from tpmodel_operator.api_model import ModelSource
from tpmodel_operator.api_spec import (
    Auth,
    Cache,
    EnvironmentVariable,
    ImageSpec,
    Network,
    PodTemplate,
    Recovery,
    ResourceClaim,
    Resources,
    Rollout,
    Scheduling,
    ServiceSpec,
    TPModelSpec,
)
from tpmodel_operator.api_status import (
    Condition,
    Failure,
    GangFault,
    GangPod,
    GangRebuild,
    GangStatus,
    HandledEnd,
    LastRestart,
    Restart,
    TPModelStatus,
)
from tpmodel_operator.api_types import FreeForm, Model, SecretKey
from tpmodel_operator.api_weights import WeightUpdates

GROUP = "tpmodel.dev"
VERSION = "v1alpha1"
KIND = "TPModel"
PLURAL = "tpmodels"


class TPModel(Model):
    """The object as the API server gives it."""

    model_config = ConfigDict(extra="ignore")

    name: str
    namespace: str
    uid: str
    generation: int
    resource_version: str = ""
    deleting: bool = False
    annotations: dict[str, str] = {}
    spec: TPModelSpec
    status: TPModelStatus = TPModelStatus()


__all__ = [
    "GROUP",
    "KIND",
    "PLURAL",
    "VERSION",
    "Auth",
    "Cache",
    "Condition",
    "EnvironmentVariable",
    "Failure",
    "FreeForm",
    "GangFault",
    "GangPod",
    "GangRebuild",
    "GangStatus",
    "HandledEnd",
    "ImageSpec",
    "LastRestart",
    "Model",
    "ModelSource",
    "Network",
    "PodTemplate",
    "Recovery",
    "ResourceClaim",
    "Resources",
    "Restart",
    "Rollout",
    "Scheduling",
    "SecretKey",
    "ServiceSpec",
    "TPModel",
    "TPModelSpec",
    "TPModelStatus",
    "WeightUpdates",
]

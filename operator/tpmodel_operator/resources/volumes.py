"""What a pod mounts, and where: the model, the cache, memory, the gang's secrets."""

from __future__ import annotations

from dataclasses import dataclass

from tpmodel_operator import defaults, names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.resources.objects import Object

MODEL_FOLDER = "/model"
CACHE_FOLDER = "/cache"
RUNTIME_FOLDER = "/run/tpmodel"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a mount of the pod's own
TEMPORARY = "/tmp"  # noqa: S108 - a mount of the pod's own
ATTEMPT_FOLDER = "/etc/tpmodel/attempt"
TOKEN_FOLDER = "/etc/tpmodel/token"  # noqa: S105 - a path
API_KEY_FOLDER = "/etc/tpmodel/auth"
TLS_FOLDER = "/etc/tpmodel/tls"

API_KEY_FILE = "api-key"

_READ_BY_GROUP = 0o440
"""The pods' group (fsGroup) may read mounted secrets, nobody else."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """One volume and its place in the worker's container."""

    volume: Object
    path: str
    read_only: bool = False

    def mount(self) -> Object:
        """As the container names it."""
        mount: Object = {"name": self.volume["name"], "mountPath": self.path}
        return mount | ({"readOnly": True} if self.read_only else {})


def mounted(model: TPModel, gang: EnsureGang) -> list[Mounted]:
    """All volumes of the operator's making."""
    spec = model.spec
    found = [
        *_model(spec),
        Mounted(_cache(spec), CACHE_FOLDER),
        Mounted({"name": "runtime", "emptyDir": {"medium": "Memory"}}, RUNTIME_FOLDER),
        Mounted({"name": "shared-memory", "emptyDir": {"medium": "Memory"}}, SHARED_MEMORY),
        Mounted({"name": "temporary", "emptyDir": {}}, TEMPORARY),
        Mounted(_attempt(gang), ATTEMPT_FOLDER, read_only=True),
        Mounted(_secret("token", names.token_secret(gang.name)), TOKEN_FOLDER, read_only=True),
    ]
    if spec.auth.api_key is not None:
        volume = _secret("api-key", spec.auth.api_key.name)
        volume["secret"]["items"] = [{"key": spec.auth.api_key.key, "path": API_KEY_FILE}]
        found.append(Mounted(volume, API_KEY_FOLDER, read_only=True))
    if spec.auth.tls_secret_name:
        found.append(Mounted(_secret("tls", spec.auth.tls_secret_name), TLS_FOLDER, read_only=True))
    return found


def model_path(spec: TPModelSpec) -> str:
    """Folder of the checkpoint in the container; empty for a model that the supervisor downloads."""
    location = defaults.model_location(spec.model.uri)
    match location.scheme:
        case "hf":
            return ""
        case "pvc" if location.path:
            return f"{MODEL_FOLDER}/{location.path}"
        case _:
            return MODEL_FOLDER


def _model(spec: TPModelSpec) -> list[Mounted]:
    location = defaults.model_location(spec.model.uri)
    match location.scheme:
        case "pvc":
            source = {"persistentVolumeClaim": {"claimName": location.name}}
        case "file":
            source = {"hostPath": {"path": location.path, "type": "Directory"}}
        case "oci":
            source = {"image": {"reference": location.name, "pullPolicy": spec.image.pull_policy}}
        case "hf":
            return []
    return [Mounted({"name": "model"} | source, MODEL_FOLDER, read_only=True)]


def _cache(spec: TPModelSpec) -> Object:
    cache = spec.cache
    match cache.type:
        case "pvc":
            source: Object = {"persistentVolumeClaim": {"claimName": cache.claim_name}}
        case "hostPath":
            source = {"hostPath": {"path": cache.path, "type": "DirectoryOrCreate"}}
        case "emptyDir":
            source = {"emptyDir": {"sizeLimit": cache.size_limit} if cache.size_limit else {}}
    return {"name": "cache"} | source


def _attempt(gang: EnsureGang) -> Object:
    return {"name": "attempt", "configMap": {"name": names.attempt_config_map(gang.name)}}


def _secret(name: str, secret: str) -> Object:
    return {"name": name, "secret": {"secretName": secret, "defaultMode": _READ_BY_GROUP}}

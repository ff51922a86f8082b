"""What a pod mounts, and where: the model, the cache, memory, the gang's secrets."""

from __future__ import annotations

from dataclasses import dataclass

from tpmodel_operator import defaults, names, weights
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import SecretKey, TPModel, TPModelSpec
from tpmodel_operator.resources.objects import Object

MODEL_FOLDER = "/model"
CACHE_FOLDER = "/cache"
RUNTIME_FOLDER = "/run/tpmodel"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a mount of the pod's own
TEMPORARY = "/tmp"  # noqa: S108 - a mount of the pod's own
ATTEMPT_FOLDER = "/etc/tpmodel/attempt"
TOKEN_FOLDER = "/etc/tpmodel/token"  # noqa: S105 - a path
TRAINER_TOKEN_FOLDER = "/etc/tpmodel/trainer"  # noqa: S105 - a path
API_KEY_FOLDER = "/etc/tpmodel/auth"
TLS_FOLDER = "/etc/tpmodel/tls"
UPDATES_FOLDER = "/persisted-updates"

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
        *_updates(spec),
    ]
    if spec.auth.api_key is not None:
        found.append(Mounted(_one_key("api-key", spec.auth.api_key, API_KEY_FILE), API_KEY_FOLDER, read_only=True))
    if spec.auth.trainer_token is not None:
        volume = _one_key("trainer-token", spec.auth.trainer_token, names.TOKEN_KEY)
        found.append(Mounted(volume, TRAINER_TOKEN_FOLDER, read_only=True))
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


def updates_path(model: TPModel, gang: EnsureGang) -> str:
    """Folder in the container where committed weights are kept; empty: nowhere.

    A claim or a node's folder may be shared by models, and versions of another checkpoint are other weights. Gangs
    write at the same time, each into its own; a gang takes up the set of the one before it with its index.
    """
    location = defaults.updates_location(model.spec)
    if location is None:
        return ""
    inside = [location.path] if location.scheme == "pvc" and location.path else []
    checkpoint = f"{model.namespace}.{model.name}.{weights.source(model)}"
    return "/".join([UPDATES_FOLDER, *inside, checkpoint, str(gang.index)])


def _updates(spec: TPModelSpec) -> list[Mounted]:
    location = defaults.updates_location(spec)
    if location is None:
        return []
    if location.scheme == "pvc":
        source: Object = {"persistentVolumeClaim": {"claimName": location.name}}
    else:
        source = {"hostPath": {"path": location.path, "type": "DirectoryOrCreate"}}
    return [Mounted({"name": "persisted-updates"} | source, UPDATES_FOLDER)]


def _attempt(gang: EnsureGang) -> Object:
    return {"name": "attempt", "configMap": {"name": names.attempt_config_map(gang.name)}}


def _one_key(name: str, key: SecretKey, file: str) -> Object:
    """A volume with one key of a user's Secret, under this file's name."""
    volume = _secret(name, key.name)
    volume["secret"]["items"] = [{"key": key.key, "path": file}]
    return volume


def _secret(name: str, secret: str) -> Object:
    return {"name": name, "secret": {"secretName": secret, "defaultMode": _READ_BY_GROUP}}

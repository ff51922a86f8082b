"""Names, labels and paths that the operator, the pods and the clients agree on."""

from __future__ import annotations

MANAGER = "tpmodel-operator"
"""Field manager of every server-side apply."""

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY_VALUE = "tpmodel"
APP_NAME = "app.kubernetes.io/name"
POD_INDEX = "apps.kubernetes.io/pod-index"
MODEL_LABEL = "tpmodel.dev/model"
GANG_LABEL = "tpmodel.dev/gang"
GANG_INDEX_LABEL = "tpmodel.dev/gang-index"
REVISION_LABEL = "tpmodel.dev/revision"
IMAGE_ANNOTATION = "tpmodel.dev/image"
TAKE_IMAGE_ANNOTATION = "tpmodel.dev/take-default-image"
"""On a TPModel: set to the operator's default image, it takes it."""
REBUILD_ANNOTATION = "tpmodel.dev/rebuild"
"""On a TPModel: each new value has every gang build a new world, once."""
RESET_WEIGHTS_ANNOTATION = "tpmodel.dev/reset-weights"
"""On a TPModel: each new value is a rollout whose gangs begin with the checkpoint."""
WEIGHTS_SOURCE_ANNOTATION = "tpmodel.dev/weights-source"
"""On a gang's StatefulSet: which checkpoint the versions of its weights count from."""
WATCH_SELECTOR = f"{MANAGED_BY}={MANAGED_BY_VALUE}"

CONTAINER = "worker"
LONGEST_GANG_NAME = 52
LONGEST_MODEL_NAME = 42
"""`<model>-<gang index of up to three digits>-<hash5>` must be a gang's name."""

INFERENCE_PORT = 9000
HTTP_PORT = 8000
CONTROL_PORT = 9001
HEALTH_PORT = 9002
METRICS_PORT = 9003

TOKEN_KEY = "token"  # noqa: S105 - the name of a key
ATTEMPT_KEY = "attempt"
REBUILD_KEY = "rebuild"
MODEL_REVISION_KEY = "model-revision"
WEIGHTS_VERSION_KEY = "weights-version"


def gang_name(model: str, index: int, revision: str) -> str:
    """The StatefulSet of a gang, and the value of GANG_LABEL."""
    return f"{model}-{index}-{revision}"


def gang_of_name(model: str, gang: str) -> tuple[int, str]:
    """Index and revision out of a gang's name; ValueError where it is none of this model's."""
    index, _, revision = gang.removeprefix(f"{model}-").partition("-")
    if gang_name(model, int(index), revision) != gang:
        raise ValueError(f"{gang!r} is no gang of {model!r}")
    return int(index), revision


def attempt_config_map(gang: str) -> str:
    """The ConfigMap that holds what a gang's pods are told, under the keys above but for the token's."""
    return f"{gang}-attempt"


def token_secret(gang: str) -> str:
    """The Secret that holds a gang's token under TOKEN_KEY."""
    return f"{gang}-token"


def pods_service(model: str) -> str:
    """The headless Service that gives every pod a DNS name, ready or not."""
    return f"{model}-pods"


def leaders_service(model: str) -> str:
    """The headless Service of the ready leader pods."""
    return f"{model}-leaders"


def trainers_service(model: str) -> str:
    """The headless Service of all leader pods, ready or not, for trainers."""
    return f"{model}-trainers"


def client_service(model: str) -> str:
    """The ClusterIP Service of the ready leader pods."""
    return model


def leader_host(model: str, gang: str, namespace: str) -> str:
    """DNS name of a gang's leader pod."""
    return f"{gang}-0.{pods_service(model)}.{namespace}.svc"


def url(model: str, namespace: str) -> str:
    """What clients dial."""
    return f"dns:///{leaders_service(model)}.{namespace}.svc:{INFERENCE_PORT}"


def trainers_url(model: str, namespace: str) -> str:
    """What trainers dial."""
    return f"dns:///{trainers_target(model, namespace)}"


def trainers_target(model: str, namespace: str) -> str:
    """The name that has the addresses of all leader pods, ready or not, and their control port."""
    return f"{trainers_service(model)}.{namespace}.svc:{CONTROL_PORT}"


def model_labels(model: str) -> dict[str, str]:
    """Labels of every object of a model."""
    return {MANAGED_BY: MANAGED_BY_VALUE, APP_NAME: "tpmodel", MODEL_LABEL: model}


def gang_labels(model: str, gang: str, index: int, revision: str) -> dict[str, str]:
    """Labels of every object of a gang."""
    return model_labels(model) | {GANG_LABEL: gang, GANG_INDEX_LABEL: str(index), REVISION_LABEL: revision}

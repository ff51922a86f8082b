"""What the API reserves is what the builders use: a user's volume, variable or mount never meets the worker's own."""

from __future__ import annotations

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.api_kubernetes import RESERVED_CONTAINER, RESERVED_PATHS, RESERVED_VOLUMES
from tpmodel_operator.api_spec import RESERVED_VARIABLES
from tpmodel_operator.resources import container, volumes

GANG = EnsureGang(name="m-0-abcde", index=0, revision="abcde", image="worker:1", attempt=1)


def model() -> TPModel:
    spec = {
        "model": {"uri": "pvc://models/x", "secretRef": {"name": "hub", "key": "token"}},
        "auth": {
            "apiKey": {"name": "key", "key": "k"},
            "tlsSecretName": "tls",
            "trainerToken": {"name": "trainer", "key": "k"},
        },
        "weightUpdates": {"persistUpdates": "pvc://updates"},
    }
    return TPModel(name="m", namespace="n", uid="u", generation=1, spec=TPModelSpec.model_validate(spec))


def test_all_volumes_of_the_worker_are_reserved_by_name() -> None:
    assert {mounted.volume["name"] for mounted in volumes.mounted(model(), GANG)} == set(RESERVED_VOLUMES)


def test_all_mounts_of_the_worker_lie_under_reserved_paths() -> None:
    paths = {mounted.path for mounted in volumes.mounted(model(), GANG)}
    assert [path for path in paths if not path.startswith(RESERVED_PATHS)] == []
    assert [reserved for reserved in RESERVED_PATHS if not any(path.startswith(reserved) for path in paths)] == []


def test_all_variables_of_the_worker_are_reserved() -> None:
    own = {variable["name"] for variable in container.environment(model().spec)}
    assert {name for name in own if not name.startswith("TPMODEL_")} == set(RESERVED_VARIABLES)


def test_the_workers_container_is_reserved() -> None:
    assert names.CONTAINER == RESERVED_CONTAINER

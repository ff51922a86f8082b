"""A newer operator, which builds pods otherwise and has another default image, leaves running gangs as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import image_load, images
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.local import LocalCluster
from tests.e2e.support.models import DeployedModel, deployed, revision_of
from tests.e2e.support.release import Release, image_value
from tests.e2e.support.restarts import Before
from tpmodel_operator import names

BUILDER = Path("operator") / "tpmodel_operator" / "resources" / "container.py"
LINE = '        {"name": "HOME", "value": volumes.TEMPORARY},\n'
ADDED = "TPMODEL_ADDED_BY_THE_NEXT_VERSION"
NEXT_IMAGE = "registry.example/tpmodel-worker:next"
SEEN_SECONDS = 60.0
"""For the new operator to lead and to have a pass over every model."""


@pytest.fixture
def upgraded(installed: Release, cluster: LocalCluster, tmp_path: Path) -> Iterator[str]:
    """The next version of the operator is installed; its image."""
    newer = next_version(tmp_path / "source")
    image_load.load(cluster.nodes, newer)
    values = installed.values()
    installed.install(
        operator=values["operator"] | {"image": image_value(newer)}, worker={"image": image_value(NEXT_IMAGE)}
    )
    yield newer
    installed.install()


def next_version(folder: Path) -> str:
    """An image of this operator whose builder adds a variable to each container."""
    for name in images.SOURCES:
        source, target = images.ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    builder = folder / BUILDER
    text = builder.read_text()
    assert text.count(LINE) == 1, "the builder has changed: adapt this test"
    builder.write_text(text.replace(LINE, f'{LINE}        {{"name": "{ADDED}", "value": "1"}},\n'))
    return images.OPERATOR.build(folder)


def test_an_upgrade_moves_no_pod_and_a_gang_that_restarts_stays_of_one_make(
    sturdy: DeployedModel, models: Kubectl, upgraded: str
) -> None:
    before = Before.of(sturdy)
    sets = statefulsets(sturdy)

    sturdy.kubectl.wait("tpmodel", sturdy.name, "condition=UpgradeAvailable", seconds=SEEN_SECONDS)

    assert NEXT_IMAGE in sturdy.condition("UpgradeAvailable")["message"]
    check_new_builder(models)
    before.check_untouched()
    assert statefulsets(sturdy) == sets

    sturdy.kubectl.delete("pod", before.worker["metadata"]["name"], wait=False)
    gang = before.wait_restarted()

    assert gang["uid"] == before.gang["uid"]
    assert statefulsets(sturdy) == sets
    assert {make(pod) for pod in sturdy.pods()} == {make(before.leader)}
    assert make(before.leader)[1] == sturdy.status()["image"]


def check_new_builder(models: Kubectl) -> None:
    """A model that is new gets what the new operator builds."""
    with deployed(models, "newer", ready=False) as model:
        model.until(lambda: statefulsets(model), what="a StatefulSet", seconds=SEEN_SECONDS)
        (template,) = [item["spec"]["template"]["spec"] for item in statefulsets(model)]
        assert ADDED in variables(template)
        assert template["containers"][0]["image"] == NEXT_IMAGE


def statefulsets(model: DeployedModel) -> list[Object]:
    """UID and spec of each."""
    found = model.kubectl.list("statefulsets", selector=f"{names.MODEL_LABEL}={model.name}")
    return [{"uid": item["metadata"]["uid"], "spec": item["spec"]} for item in found]


def make(pod: Object) -> tuple[str, str, tuple[str, ...], str]:
    """What must be alike in all pods of a gang."""
    container = pod["spec"]["containers"][0]
    hashed = pod["metadata"]["labels"]["controller-revision-hash"]
    return revision_of(pod), container["image"], variables(pod["spec"]), hashed


def variables(spec: Object) -> tuple[str, ...]:
    """Names of the first container's variables."""
    return tuple(variable["name"] for variable in spec["containers"][0]["env"])

"""Examples and YAML of the docs on a real API server, as users apply them: `kubectl apply --dry-run=server`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support import documents
from support.crd_server import KubeApi, serving
from support.documents import Block, Json
from tests.cluster.kubectl import Kubectl
from tpmodel_operator import defaults
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.resources import statefulset

# kubectl is built on a machine's first run.
pytestmark = pytest.mark.timeout(1800)

STATEFUL_SETS = "/apis/apps/v1/namespaces/default/statefulsets"


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with serving() as api:
        yield api


def apply(server: KubeApi, text: str) -> str:
    return Kubectl(server.api.kubeconfig).run("apply", "--dry-run=server", "--filename=-", standard_input=text)


@pytest.mark.parametrize("path", documents.examples(), ids=lambda path: path.name)
def test_every_example_is_taken(server: KubeApi, path: Path) -> None:
    said = apply(server, path.read_text())
    assert said.count("created (server dry run)") == len(documents.objects_in(path))


@pytest.mark.parametrize("block", documents.yaml_blocks(), ids=str)
def test_all_yaml_of_the_docs_is_taken(server: KubeApi, block: Block) -> None:
    objects = documents.objects_of(block)
    said = apply(server, yaml.safe_dump_all(objects))
    assert said.count("created (server dry run)") == len(objects)


def models() -> list[Json]:
    found = [item for path in documents.examples() for item in documents.objects_in(path)]
    found += [item for block in documents.yaml_blocks() for item in documents.objects_of(block)]
    return [item for item in found if item["kind"] == "TPModel"]


@pytest.mark.parametrize("item", models(), ids=lambda item: item["spec"]["model"]["uri"])
def test_the_gang_that_comes_of_each_is_taken_too(server: KubeApi, item: Json) -> None:
    spec = TPModelSpec.model_validate(item["spec"])
    name = item["metadata"]["name"]
    model = TPModel(name=name, namespace="default", uid="uid", generation=1, spec=spec)
    gang = EnsureGang(name=f"{name}-0-abcde", index=0, revision="abcde", image="worker:1", attempt=1)
    made = server.call("POST", STATEFUL_SETS, statefulset.build(model, gang), dryRun="All", fieldValidation="Strict")
    assert made["spec"]["replicas"] == defaults.pods_per_gang(spec)

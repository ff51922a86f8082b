"""Watches against a real API server: versions that are gone, rights in two namespaces only, and a TPModel watch that
has died without a trace."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.kube_config import load_kube_config

from support import deaf_operator
from support.crd_server import MODELS, KubeApi, serving, tpmodel
from support.operator_process import Operator, operating, wait_for
from tpmodel_operator import records
from tpmodel_operator.kube import CONFIG_MAPS, PODS, ApiError, Kube, Page
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.observed import PodRecord
from tpmodel_operator.store import Store
from tpmodel_operator.watch import Watch

SELECTOR = "app.kubernetes.io/managed-by=tpmodel"


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    with serving() as server:
        yield server


@pytest_asyncio.fixture
async def kube(api: KubeApi) -> AsyncIterator[Kube]:
    configuration = Configuration()
    await load_kube_config(str(api.api.kubeconfig), client_configuration=configuration)
    client = Kube(configuration, Metrics())
    yield client
    await client.close()


def pod(name: str, namespace: str = "default") -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "tpmodel", "tpmodel.dev/model": "m", "tpmodel.dev/gang": "m-0-abcde"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"containers": [{"name": "worker", "image": "i"}]},
    }


async def until(condition, what: str) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"waited for {what}")


@pytest.mark.parametrize("metadata_only", [False, True])
async def test_an_empty_list_has_no_items(kube: Kube, metadata_only: bool) -> None:
    pages = [page async for page in kube.list(PODS, None, selector="no=such", metadata_only=metadata_only)]
    assert [page.items for page in pages] == [[]]


class ForgetfulKube:
    """A Kube whose first list names a version that the server no longer knows."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube
        self.lists = 0
        self.errors: list[int] = []

    async def list(self, resource, namespace, *, selector: str = "") -> AsyncIterator[Page]:
        self.lists += 1
        async for page in self.kube.list(resource, namespace, selector=selector):
            yield Page(page.items, "1") if self.lists == 1 else page

    async def watch(self, resource, namespace, *, resource_version: str, selector: str = ""):
        try:
            async for event in self.kube.watch(
                resource, namespace, resource_version=resource_version, selector=selector
            ):
                yield event
        except ApiError as error:
            self.errors.append(error.status)
            raise


async def test_a_version_that_the_server_forgot_is_followed_by_a_fresh_list(api: KubeApi, kube: Kube):
    # Events older than a restarted server's cache are gone.
    api.call("POST", "/api/v1/namespaces/default/pods", pod("m-0-abcde-0"))
    api.api.apiserver.kill()
    api.api.start_apiserver()
    store: Store[PodRecord] = Store()
    forgetful = ForgetfulKube(kube)
    watch = Watch(
        forgetful, PODS, None, parse=records.pod, store=store, changed=lambda key, at: None, metrics=Metrics()
    )
    task = asyncio.create_task(watch.run())
    await until(lambda: forgetful.lists == 2, "a second list")
    assert forgetful.errors == [410]
    api.call("POST", "/api/v1/namespaces/default/pods", pod("m-0-abcde-1"))
    await until(lambda: len(store.versions()) == 2, "the new pod")
    task.cancel()


async def test_lists_come_in_pages_and_may_be_metadata_only(api: KubeApi, kube: Kube):
    for number in range(5):
        body = {"metadata": {"name": f"c{number}", "labels": {"paged": "yes"}}, "data": {"k": "v"}}
        api.call("POST", "/api/v1/namespaces/default/configmaps", body)
    pages = [page async for page in kube.list(CONFIG_MAPS, "default", selector="paged=yes", page=2)]
    assert [len(page.items) for page in pages] == [2, 2, 1]
    async for page in kube.list(CONFIG_MAPS, "default", selector="paged=yes", metadata_only=True):
        assert all("data" not in item for item in page.items)
        assert all(item["metadata"]["uid"] for item in page.items)


async def test_errors_have_their_status_and_reason(api: KubeApi, kube: Kube):
    with pytest.raises(ApiError) as missing:
        await kube.get(PODS, "default", "unknown")
    assert missing.value.not_found
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "twice"}}
    await kube.create(CONFIG_MAPS, "default", body, dry_run=True)
    await kube.create(CONFIG_MAPS, "default", body)
    with pytest.raises(ApiError) as twice:
        await kube.create(CONFIG_MAPS, "default", body, dry_run=True)
    assert (twice.value.conflict, twice.value.reason) == (True, "AlreadyExists")
    assert not await kube.discard(CONFIG_MAPS, "default", "twice", uid="another")
    assert await kube.discard(CONFIG_MAPS, "default", "twice")
    assert not await kube.discard(CONFIG_MAPS, "default", "twice")


async def test_no_answer_is_an_error_without_status(kube: Kube):
    kube.configuration.host = "https://127.0.0.1:1"
    with pytest.raises(ApiError) as caught:
        await kube.get(PODS, "default", "p")
    assert caught.value.status == 0


def grant(api: KubeApi, user: str, namespace: str) -> None:
    """Everything that the operator needs, in one namespace."""
    base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    rule = {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}
    api.call("POST", f"{base}/roles", {"metadata": {"name": "operator"}, "rules": [rule]})
    binding = {
        "metadata": {"name": "operator"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"},
        "subjects": [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}],
    }
    api.call("POST", f"{base}/rolebindings", binding)


def test_an_operator_of_two_namespaces_needs_rights_in_those_only(api: KubeApi, tmp_path: Path):
    for namespace in ("one", "two", "three"):
        api.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    for namespace in ("one", "two"):
        grant(api, "restricted-operator", namespace)
    kubeconfig = api.api.user("restricted.kubeconfig", "restricted-operator")
    arguments = ["--namespace=one", "--watch-namespace=one", "--watch-namespace=two"]
    with operating(Operator(kubeconfig, tmp_path / "log", arguments=arguments)) as operator:
        for namespace in ("one", "two", "three"):
            body = tpmodel("m", device="cpu")
            body["metadata"]["namespace"] = namespace
            api.call("POST", MODELS.replace("/default/", f"/{namespace}/"), body)
        for namespace in ("one", "two"):
            path = f"/apis/apps/v1/namespaces/{namespace}/statefulsets"
            wait_for(lambda path=path: api.call("GET", path)["items"], seconds=15, what=f"gangs in {namespace}")
        assert api.call("GET", "/apis/apps/v1/namespaces/three/statefulsets")["items"] == []
        assert operator.healthy()
        assert "Forbidden" not in operator.lines()


def test_a_watch_of_tpmodels_that_has_died_fails_the_liveness_probe(api: KubeApi, tmp_path: Path):
    command = [sys.executable, deaf_operator.__file__]
    environment = {"PYTHONPATH": str(Path(deaf_operator.__file__).parents[1])}
    deaf = Operator(
        api.api.kubeconfig, tmp_path / "log", arguments=["--resync-seconds=2"], command=command, environment=environment
    )
    with operating(deaf) as operator:
        wait_for(operator.leads, seconds=20, what="a leader")
        assert operator.healthy()
        api.create(tpmodel("unheard", device="cpu"))
        wait_for(lambda: not operator.healthy(), seconds=15, what="a failing probe")
        assert "tpmodels are not as the watch says" in operator.get("/healthz")[1]

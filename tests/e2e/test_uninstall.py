"""Uninstalling with models present: nothing hangs and nothing is left, whether TPModels are kept or not."""

from __future__ import annotations

import json

from tests.cluster.kubectl import Kubectl
from tests.cluster.waiting import wait_until
from tests.e2e.support import release
from tests.e2e.support.clients import Client
from tests.e2e.support.models import GONE_SECONDS, DeployedModel, deploy
from tests.e2e.support.release import Release

KEPT, REMOVED = "kept", "removed"
OWNED = "statefulsets,services,secrets,configmaps,serviceaccounts,networkpolicies,poddisruptionbudgets,pods"
OF_RELEASE = "clusterroles,clusterrolebindings"


def test_models_serve_on_without_the_operator_and_can_be_deleted(
    installed: Release, models: Kubectl, client: Client
) -> None:
    model = deploy(models, KEPT)
    before = model.uids()
    installed.uninstall()
    assert not installed.installed()
    assert model.uids() == before
    assert client.complete(model.url, [[5, 6, 7]], max_tokens=4, ignore_eos=True)
    model.delete()
    _wait_nothing_is_left_of(model)


def test_an_uninstall_that_keeps_nothing_removes_models_and_their_pods(installed: Release, models: Kubectl) -> None:
    # Over the CRD that the first uninstall has left.
    installed.install(crds={"keep": False})
    model = deploy(models, REMOVED, ready=False)
    model.until(lambda: len(model.pods()) == 2, what="two pods")
    installed.uninstall()
    assert models.find("crd", release.CRD) is None
    _wait_nothing_is_left_of(model)
    owned = json.loads(models.run("get", OF_RELEASE, "--output=json", f"--selector={release.OF_RELEASE}"))["items"]
    assert [item["metadata"]["name"] for item in owned] == []
    # What hangs in deletion would keep it.
    models.delete("namespace", release.NAMESPACE)


def _wait_nothing_is_left_of(model: DeployedModel) -> None:
    def left() -> list[str]:
        names = model.kubectl.run("get", OWNED, f"--selector=tpmodel.dev/model={model.name}", "--output=name")
        return names.split()

    wait_until(
        lambda: not left(), what=f"nothing left of {model.name}", seconds=GONE_SECONDS, explain=lambda: str(left())
    )

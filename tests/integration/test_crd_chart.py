"""The chart on a real API server: real `helm install`, real Pod Security, real authorisation."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.chart import CHART, NAMESPACE, RELEASE, helm, one, rendered
from support.crd_server import CRDS, MODELS, KubeApi, RefusedError, tpmodel
from tests.cluster import apiserver

# helm is built on a machine's first run.
pytestmark = pytest.mark.timeout(1800)

DEPLOY = Path(__file__).parents[2] / "deploy" / "tpmodel.yaml"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:tpmodel-operator"
CRD = f"{CRDS}/tpmodels.tpmodel.dev"


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    """The chart is installed in a namespace that enforces Pod Security `restricted`; team-a is another one."""
    with apiserver.running() as api:
        server = KubeApi(api)
        for name in (NAMESPACE, "team-a", "team-b"):
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
            server.call("POST", "/api/v1/namespaces", body)
        on(server, "install", RELEASE, str(CHART))
        yield server


def on(server: KubeApi, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return helm(*arguments, "--namespace", NAMESPACE, "--kubeconfig", str(server.api.kubeconfig), check=check)


def allowed(server: KubeApi, user: str, verb: str, resource: str, namespace: str, name: str = "") -> bool:
    group, _, plural = resource.rpartition("/")
    plural, _, subresource = plural.partition(":")
    attributes = {"verb": verb, "group": group, "resource": plural, "subresource": subresource}
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": attributes | {"namespace": namespace, "name": name}},
    }
    answer = server.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
    return answer["status"]["allowed"]


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("watch", "tpmodel.dev/tpmodels"),
        ("patch", "tpmodel.dev/tpmodels:status"),
        ("create", "apps/statefulsets"),
        ("delete", "apps/statefulsets"),
        ("delete", "pods"),
        ("create", "secrets"),
        ("patch", "configmaps"),
        ("patch", "networking.k8s.io/networkpolicies"),
        ("delete", "policy/poddisruptionbudgets"),
        ("get", "persistentvolumeclaims"),
        ("get", "nodes"),
        ("list", "nodes"),
        ("get", "services"),
    ],
)
def test_the_operator_may_do_its_work_everywhere(server: KubeApi, verb: str, resource: str) -> None:
    assert allowed(server, ACCOUNT, verb, resource, "" if resource == "nodes" else "team-a")


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("get", "secrets"),
        ("list", "secrets"),
        ("delete", "secrets"),
        ("update", "secrets"),
        ("get", "pods:log"),
        ("create", "pods:exec"),
        ("create", "pods"),
        ("patch", "apps/statefulsets"),
        ("update", "tpmodel.dev/tpmodels"),
        ("patch", "tpmodel.dev/tpmodels"),
        ("delete", "tpmodel.dev/tpmodels"),
        ("list", "configmaps"),
        ("delete", "services"),
        ("create", "rbac.authorization.k8s.io/rolebindings"),
        ("watch", "nodes"),
        ("patch", "nodes"),
        ("update", "coordination.k8s.io/leases"),
    ],
)
def test_the_operator_may_do_no_more(server: KubeApi, verb: str, resource: str) -> None:
    assert not allowed(server, ACCOUNT, verb, resource, "team-a")


def test_the_operator_may_renew_its_own_lease_only(server: KubeApi) -> None:
    lease = "coordination.k8s.io/leases"
    assert allowed(server, ACCOUNT, "create", lease, NAMESPACE)
    assert allowed(server, ACCOUNT, "update", lease, NAMESPACE, "tpmodel-operator")
    assert not allowed(server, ACCOUNT, "update", lease, NAMESPACE, "other")


def test_restricted_to_namespaces_the_operator_has_rights_only_there(server: KubeApi) -> None:
    account = f"system:serviceaccount:{NAMESPACE}:narrow-tpmodel-operator"
    flags = ["--set", "watchNamespaces={team-a},crds.enabled=false"]
    on(server, "install", "narrow", str(CHART), *flags)
    try:
        there = {name: allowed(server, account, "create", "apps/statefulsets", name) for name in ("team-a", "team-b")}
        assert there == {"team-a": True, "team-b": False}
        assert allowed(server, account, "get", "nodes", "")
        assert not allowed(server, account, "list", "tpmodel.dev/tpmodels", "")
    finally:
        on(server, "uninstall", "narrow")


@pytest.mark.parametrize("kind", ["operator", "helm test"])
def test_pods_pass_pod_security_restricted(server: KubeApi, kind: str) -> None:
    objects = rendered()
    template = one(objects, "Deployment")["spec"]["template"] if kind == "operator" else one(objects, "Pod")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": template["spec"]}
    server.call("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", pod, dryRun="All", fieldValidation="Strict")


def test_pod_security_would_have_refused_a_privileged_pod(server: KubeApi) -> None:
    spec = {"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": True}}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": spec}
    with pytest.raises(RefusedError, match="violates PodSecurity"):
        server.call("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", pod, dryRun="All")


def monitors_off(item: dict[str, Any]) -> bool:
    return item["apiVersion"] != "monitoring.coreos.com/v1"


def test_every_object_is_one_that_the_api_server_knows_to_the_last_field(server: KubeApi) -> None:
    values = {
        "watchNamespaces": ["team-a"],
        "operator": {"networkPolicy": True, "tolerations": [{"operator": "Exists"}], "priorityClassName": "x"},
        "monitoring": {"dashboard": {"enabled": True}},
    }
    plurals = {"NetworkPolicy": "networkpolicies"}
    objects = [item for item in rendered(values, release="other-tpmodel") if monitors_off(item)]
    for item in objects:
        group, _, version = item["apiVersion"].rpartition("/")
        base = f"/apis/{group}/{version}" if group else f"/api/{version}"
        namespace = item["metadata"].get("namespace")
        base += f"/namespaces/{namespace}" if namespace else ""
        plural = plurals.get(item["kind"], item["kind"].lower() + "s")
        server.call(
            "PATCH",
            f"{base}/{plural}/{item['metadata']['name']}",
            item,
            content_type="application/apply-patch+yaml",
            fieldManager="test",
            fieldValidation="Strict",
            force="true",
            dryRun="All",
        )
    assert len(objects) > 15


def test_an_upgrade_keeps_models_and_an_uninstall_keeps_the_crd(server: KubeApi) -> None:
    server.create(tpmodel("kept"))
    before = server.call("GET", f"{MODELS}/kept")["metadata"]
    on(server, "upgrade", RELEASE, str(CHART), "--set", "operator.replicas=3")
    deployment = server.call("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/tpmodel-operator")
    assert deployment["spec"]["replicas"] == 3
    told = on(server, "uninstall", RELEASE).stdout
    assert "tpmodels.tpmodel.dev" in told
    after = server.call("GET", f"{MODELS}/kept")["metadata"]
    assert (after["uid"], after["resourceVersion"]) == (before["uid"], before["resourceVersion"])
    on(server, "install", RELEASE, str(CHART))
    assert server.call("GET", f"{MODELS}/kept")["metadata"]["uid"] == before["uid"]


def test_the_rendered_file_installs_without_helm() -> None:
    with apiserver.running() as api:
        server = KubeApi(api)
        applied = subprocess.run(
            [
                kubectl(),
                "--kubeconfig",
                str(api.kubeconfig),
                "apply",
                "--server-side",
                "--validate=strict",
                "-f",
                str(DEPLOY),
            ],
            capture_output=True,
            text=True,
        )
        assert applied.returncode == 0, applied.stderr
        documents = list(yaml.safe_load_all(DEPLOY.read_text()))
        assert applied.stdout.count("serverside-applied") == len(documents)
        assert server.call("GET", CRD)["spec"]["group"] == "tpmodel.dev"


def kubectl() -> str:
    from tests.cluster import binaries

    return str(binaries.path(binaries.KUBECTL))

"""What the chart makes of its values."""

from __future__ import annotations

from typing import Any

import pytest

from support.chart import CHART as CHART_FOLDER
from support.chart import NAMESPACE, helm, of_kind, one, rendered

# helm is built on a machine's first run.
pytestmark = pytest.mark.timeout(1800)

DEFAULT = "tpmodel-operator"


def operator_pod(values: dict[str, Any] | None = None) -> dict[str, Any]:
    return one(rendered(values), "Deployment")["spec"]["template"]["spec"]


def arguments(values: dict[str, Any] | None = None) -> list[str]:
    return operator_pod(values)["containers"][0]["args"]


def test_lint_finds_nothing() -> None:
    result = helm("lint", "--strict", str(CHART_FOLDER))
    assert "0 chart(s) failed" in result.stdout
    assert "[WARNING]" not in result.stdout


def test_default_values_render_these_kinds() -> None:
    kinds = sorted(item["kind"] for item in rendered() if "helm.sh/hook" not in item["metadata"].get("annotations", {}))
    assert kinds == [
        "ClusterRole",
        "ClusterRole",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "Deployment",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ]


def test_two_replicas_on_different_nodes_if_possible() -> None:
    deployment = one(rendered(), "Deployment")
    assert deployment["spec"]["replicas"] == 2
    constraint = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"][0]
    assert constraint["topologyKey"] == "kubernetes.io/hostname"
    assert constraint["labelSelector"] == deployment["spec"]["selector"]


def test_the_selector_does_not_meet_the_pods_of_models() -> None:
    deployment = one(rendered(), "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels["app.kubernetes.io/name"] != "tpmodel"
    assert labels["app.kubernetes.io/managed-by"] != "tpmodel"


def test_the_service_and_the_budget_select_the_operators_pods() -> None:
    objects = rendered()
    labels = one(objects, "Deployment")["spec"]["selector"]["matchLabels"]
    assert one(objects, "Service")["spec"]["selector"] == labels
    assert one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels


def test_images_default_to_the_charts_version() -> None:
    assert operator_pod()["containers"][0]["image"] == "tpmodel-operator:0.1.0"
    assert "--default-image=tpmodel-worker:0.1.0" in arguments()


def test_a_digest_wins_over_a_tag() -> None:
    digest = f"sha256:{'a' * 64}"
    image = {"repository": "registry.example/x", "tag": "1", "digest": digest}
    values = {"operator": {"image": image}, "worker": {"image": image}}
    assert operator_pod(values)["containers"][0]["image"] == f"registry.example/x@{digest}"
    assert f"--default-image=registry.example/x@{digest}" in arguments(values)


def test_lists_become_repeated_flags() -> None:
    given = arguments(
        {
            "watchNamespaces": ["a", "b"],
            "allowedHostPaths": ["/models", "/cache/x"],
            "monitoringNamespaces": ["monitoring"],
            "operator": {"extraArgs": ["--workers=4"]},
        }
    )
    assert given[-6:] == [
        "--watch-namespace=a",
        "--watch-namespace=b",
        "--allowed-host-path=/models",
        "--allowed-host-path=/cache/x",
        "--monitoring-namespace=monitoring",
        "--workers=4",
    ]


def test_no_host_path_and_no_namespace_is_named_by_default() -> None:
    assert [flag for flag in arguments() if flag.startswith(("--allowed", "--watch", "--monitoring"))] == []


def test_a_single_replica_has_no_budget() -> None:
    assert of_kind(rendered({"operator": {"replicas": 1}}), "PodDisruptionBudget") == []


def test_pull_secrets_reach_every_pod() -> None:
    objects = rendered({"operator": {"image": {"pullSecrets": ["registry"]}}})
    expected = [{"name": "registry"}]
    assert one(objects, "Deployment")["spec"]["template"]["spec"]["imagePullSecrets"] == expected
    assert one(objects, "Pod")["spec"]["imagePullSecrets"] == expected


def test_placement_reaches_the_operator() -> None:
    placement = {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
    }
    pod = operator_pod({"operator": placement})
    assert {key: pod[key] for key in placement} == placement


def test_every_namespaced_object_says_its_namespace() -> None:
    values = {"watchNamespaces": ["a"], "monitoring": {"podMonitor": {"enabled": True}}}
    cluster_wide = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    without = [
        item["kind"]
        for item in rendered(values)
        if item["kind"] not in cluster_wide and "namespace" not in item["metadata"]
    ]
    assert without == []


def test_another_release_has_names_of_its_own() -> None:
    first, second = ({(item["kind"], item["metadata"]["name"]) for item in rendered(release=name)} for name in "ab")
    assert {kind for kind, _ in first & second} == {"CustomResourceDefinition"}


# -------------------------------------------------------------------------------------------------------- CRD


def test_the_crd_stays_when_the_release_goes() -> None:
    annotations = one(rendered(), "CustomResourceDefinition")["metadata"]["annotations"]
    assert annotations == {"helm.sh/resource-policy": "keep"}


def test_the_crd_goes_with_the_release_where_that_is_wanted() -> None:
    assert "annotations" not in one(rendered({"crds": {"keep": False}}), "CustomResourceDefinition")["metadata"]


def test_the_crd_can_be_left_out() -> None:
    assert of_kind(rendered({"crds": {"enabled": False}}), "CustomResourceDefinition") == []


# ------------------------------------------------------------------------------------------------- monitoring


def test_monitoring_is_off_by_default() -> None:
    assert {item["kind"] for item in rendered()} & {"PodMonitor", "ServiceMonitor", "ConfigMap"} == set()


def test_pod_monitors_scrape_the_operator_and_all_models() -> None:
    objects = rendered({"monitoring": {"podMonitor": {"enabled": True, "interval": "5s", "labels": {"a": "b"}}}})
    operator = one(objects, "PodMonitor", DEFAULT)
    models = one(objects, "PodMonitor", "tpmodel-models")
    assert operator["spec"]["selector"] == one(objects, "Deployment")["spec"]["selector"]
    assert models["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/managed-by": "tpmodel"}
    assert models["spec"]["namespaceSelector"] == {"any": True}
    assert {monitor["spec"]["podMetricsEndpoints"][0]["interval"] for monitor in (operator, models)} == {"5s"}
    assert {monitor["metadata"]["labels"]["a"] for monitor in (operator, models)} == {"b"}


def test_pod_monitors_keep_to_the_namespaces_that_are_watched() -> None:
    objects = rendered({"monitoring": {"podMonitor": {"enabled": True}}, "watchNamespaces": ["a"]})
    assert one(objects, "PodMonitor", "tpmodel-models")["spec"]["namespaceSelector"] == {"matchNames": ["a"]}


def test_the_service_monitor_names_a_port_of_the_service() -> None:
    objects = rendered({"monitoring": {"serviceMonitor": {"enabled": True}}})
    monitor = one(objects, "ServiceMonitor")["spec"]
    service = one(objects, "Service")
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()


def test_the_network_policy_lets_monitoring_reach_metrics() -> None:
    policy = one(rendered({"operator": {"networkPolicy": True}, "monitoringNamespaces": ["prom"]}), "NetworkPolicy")
    metrics, health = policy["spec"]["ingress"]
    namespaces = metrics["from"][0]["namespaceSelector"]["matchExpressions"][0]["values"]
    assert (metrics["ports"], namespaces) == ([{"port": "metrics"}], [NAMESPACE, "prom"])
    assert health == {"ports": [{"port": "health"}]}


# ------------------------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "for TPModels in all namespaces"),
        ({"watchNamespaces": ["a", "b"]}, "for TPModels in a, b"),
        ({"crds": {"keep": False}}, "uninstalling this release deletes every TPModel"),
        ({"crds": {"enabled": False}}, "upgrade it before the operator"),
        ({"allowedHostPaths": ["/models"]}, "TPModels may use /models of their nodes"),
        ({"monitoring": {"podMonitor": {"enabled": True}}}, "add Prometheus' namespace to monitoringNamespaces"),
    ],
)
def test_notes_say_what_follows_from_the_values(values: dict[str, Any], told: str) -> None:
    import yaml

    arguments = ["install", "tpmodel", str(CHART_FOLDER), "--namespace", NAMESPACE, "--dry-run=client", "--values", "-"]
    assert told in helm(*arguments, given=yaml.safe_dump(values)).stdout

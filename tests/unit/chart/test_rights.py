"""RBAC of the chart: what the operator may do, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from support.chart import NAMESPACE, of_kind, one, rendered

pytestmark = pytest.mark.timeout(1800)

CLUSTER = f"tpmodel-operator-{NAMESPACE}"

ALLOWED = {
    "tpmodel.dev/tpmodels": {"get", "list", "watch"},
    "tpmodel.dev/tpmodels/status": {"patch"},
    "apps/statefulsets": {"get", "list", "watch", "create", "delete"},
    "/pods": {"get", "list", "watch", "delete"},
    "/secrets": {"create"},
    "/configmaps": {"get", "create", "patch"},
    "/services": {"get", "create", "patch"},
    "/serviceaccounts": {"get", "create", "patch"},
    "networking.k8s.io/networkpolicies": {"get", "create", "patch"},
    "policy/poddisruptionbudgets": {"get", "create", "patch", "delete"},
    "/persistentvolumeclaims": {"get"},
    "/events": {"get", "create", "patch"},
}
NODES = {"/nodes": {"get", "list"}}
LEASES = {"coordination.k8s.io/leases": {"create", "get", "update"}}


def granted(role: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault(f"{group}/{resource}", set()).update(rule["verbs"])
    return found


def test_cluster_wide_the_operator_has_these_rights_and_no_others() -> None:
    assert granted(one(rendered(), "ClusterRole", CLUSTER)) == ALLOWED | NODES


def test_restricted_to_namespaces_only_nodes_are_read_cluster_wide() -> None:
    objects = rendered({"watchNamespaces": ["a", "b"]})
    assert granted(one(objects, "ClusterRole", CLUSTER)) == NODES
    roles = {role["metadata"]["namespace"]: granted(role) for role in of_kind(objects, "Role")}
    assert {name: roles[name] for name in "ab"} == {"a": ALLOWED, "b": ALLOWED}


def test_nodes_can_be_left_out() -> None:
    without = {"rbac": {"nodes": False}}
    assert granted(one(rendered(without), "ClusterRole", CLUSTER)) == ALLOWED
    restricted = rendered(without | {"watchNamespaces": ["a"]})
    names = [
        item["metadata"]["name"] for kind in ("ClusterRole", "ClusterRoleBinding") for item in of_kind(restricted, kind)
    ]
    assert CLUSTER not in names


def test_every_binding_names_a_role_that_exists_and_the_operators_account() -> None:
    objects = rendered({"watchNamespaces": ["a", "b"]})
    account = {"kind": "ServiceAccount", "name": "tpmodel-operator", "namespace": NAMESPACE}
    roles = {(role["kind"], role["metadata"].get("namespace"), role["metadata"]["name"]) for role in objects}
    bindings = [item for kind in ("RoleBinding", "ClusterRoleBinding") for item in of_kind(objects, kind)]
    own = [item for item in bindings if "helm.sh/hook" not in item["metadata"].get("annotations", {})]
    assert len(own) == 4
    for binding in own:
        role = binding["roleRef"]
        assert (role["kind"], binding["metadata"].get("namespace"), role["name"]) in roles
        assert binding["subjects"] == [account]


def test_leader_election_is_a_right_in_the_releases_namespace_on_one_lease() -> None:
    role = one(rendered(), "Role", "tpmodel-operator-lease")
    assert granted(role) == LEASES
    by_name = [rule for rule in role["rules"] if rule["verbs"] != ["create"]]
    assert [rule["resourceNames"] for rule in by_name] == [["tpmodel-operator"]]


def test_a_foreign_account_is_bound_where_none_is_made() -> None:
    objects = rendered({"operator": {"serviceAccount": {"create": False, "name": "mine"}}})
    assert [item["metadata"]["name"] for item in of_kind(objects, "ServiceAccount")] == ["tpmodel-test"]
    assert one(objects, "ClusterRoleBinding")["subjects"][0]["name"] == "mine"
    assert one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "mine"


def test_rights_can_be_left_to_others() -> None:
    objects = rendered({"rbac": {"create": False, "userRoles": False}})
    assert of_kind(objects, "ClusterRole") == []
    assert [item["metadata"]["name"] for item in of_kind(objects, "Role")] == ["tpmodel-test"]


@pytest.mark.parametrize(
    ("name", "aggregated", "writes"),
    [("tpmodel-editor", {"admin", "edit"}, True), ("tpmodel-viewer", {"view"}, False)],
)
def test_users_get_tpmodels_with_the_roles_they_have(name: str, aggregated: set[str], *, writes: bool) -> None:
    role = one(rendered(), "ClusterRole", name)
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    labels = role["metadata"]["labels"]
    assert {label.removeprefix(prefix) for label in labels if label.startswith(prefix)} == aggregated
    rights = granted(role)
    assert ("create" in rights["tpmodel.dev/tpmodels"], "patch" in rights["tpmodel.dev/tpmodels/scale"]) == (
        writes,
        writes,
    )
    assert rights["tpmodel.dev/tpmodels/status"] == {"get"}

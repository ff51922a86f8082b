"""Wrong values are refused by name, before anything is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from support.chart import CHART, template

pytestmark = pytest.mark.timeout(1800)

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"replicas": 3}, "replicas"),
        ({"operator": {"replica": 3}}, "replica"),
        ({"operator": {"replicas": "two"}}, "/operator/replicas"),
        ({"operator": {"logFormat": "xml"}}, "/operator/logFormat"),
        ({"operator": {"image": {"digest": "abc"}}}, "/operator/image/digest"),
        ({"operator": {"extraArgs": ["workers=4"]}}, "/operator/extraArgs/0"),
        ({"worker": {"image": {"repository": ""}}}, "/worker/image/repository"),
        ({"watchNamespaces": "a"}, "/watchNamespaces"),
        ({"watchNamespaces": ["A_b"]}, "/watchNamespaces/0"),
        ({"allowedHostPaths": ["models"]}, "/allowedHostPaths/0"),
        ({"allowedHostPaths": ["/"]}, "/allowedHostPaths/0"),
        ({"allowedHostPaths": ["/models/../etc"]}, "/allowedHostPaths/0"),
        ({"crds": {"install": True}}, "install"),
        ({"monitoring": {"podMonitor": {"interval": "often"}}}, "/monitoring/podMonitor/interval"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], path: str) -> None:
    result = template(values, check=False)
    assert result.returncode != 0
    assert path in result.stderr


@pytest.mark.parametrize("path", ["/models", "/models/", "/var/lib/.hidden/..x/a.b"])
def test_a_host_path_prefix_is_accepted(path: str) -> None:
    assert template({"allowedHostPaths": [path]}).returncode == 0


def test_a_foreign_service_account_must_be_named() -> None:
    result = template({"operator": {"serviceAccount": {"create": False}}}, check=False)
    assert "operator.serviceAccount.name is needed" in result.stderr


def fields(node: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from fields(child, f"{path}.{name}")


def keys(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield f"{path}.{name}"
            yield from keys(child, f"{path}.{name}")


def test_the_schema_knows_exactly_the_values_that_there_are() -> None:
    free = {".monitoring.dashboard.labels.grafana_dashboard", ".global"}
    resources = {key for key in keys(VALUES) if key.startswith(".operator.resources.")}
    assert set(fields(SCHEMA)) - free == set(keys(VALUES)) - resources - free

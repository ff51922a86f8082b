"""Chart, code, docs and the rendered manifests say the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from support.chart import CHART, NAMESPACE, helm, one, rendered
from tpmodel_operator import crd, names
from tpmodel_operator.main import main
from tpmodel_operator.metrics import Metrics

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[3]
WORKER = ROOT / "worker" / "tpmodel_worker"


def test_generated_files_are_what_code_and_chart_make() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "scripts.manifests", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.stdout, result.returncode) == ("", 0), result.stderr


def test_the_charts_crd_is_the_codes() -> None:
    from_chart = one(rendered(), "CustomResourceDefinition")
    assert from_chart["spec"] == crd.render()["spec"]
    assert from_chart["metadata"]["name"] == crd.render()["metadata"]["name"]


def options() -> dict[str, click.Option]:
    return {option: parameter for parameter in main.params if isinstance(parameter, click.Option)
            for option in parameter.opts}  # fmt: skip


def test_every_flag_that_the_chart_writes_is_one_of_the_operators() -> None:
    everything = {"watchNamespaces": ["a"], "allowedHostPaths": ["/m"], "monitoringNamespaces": ["p"]}
    container = one(rendered(everything), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["tpmodel-operator"]
    given = [argument.partition("=") for argument in container["args"]]
    for flag, _, value in given:
        option = options()[flag]
        option.type.convert(value, option, click.Context(main))
    assert {flag for flag, _, _ in given} >= {"--default-image", "--namespace", "--resync-seconds"}


def test_the_identity_of_the_leader_election_is_the_pod() -> None:
    container = one(rendered(), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert options()["--pod-name"].envvar in {variable["name"] for variable in container["env"]}


def test_ports_and_probes_are_the_operators_defaults() -> None:
    container = one(rendered(), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    flags = dict(argument.lstrip("-").split("=", 1) for argument in container["args"])
    assert ports == {"health": int(flags["health-port"]), "metrics": int(flags["metrics-port"])}
    paths = {container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")}
    source = (ROOT / "operator" / "tpmodel_operator" / "probes.py").read_text()
    assert paths == {"/healthz", "/readyz"}
    assert all(f'"{path}"' in source for path in paths)


def test_the_lease_that_may_be_renewed_is_the_one_that_is_used() -> None:
    role = one(rendered(), "Role", "tpmodel-operator-lease")
    assert [rule["resourceNames"] for rule in role["rules"] if "resourceNames" in rule] == [[names.MANAGER]]


def test_pod_monitors_select_the_pods_that_the_operator_makes() -> None:
    objects = rendered({"monitoring": {"podMonitor": {"enabled": True}}})
    monitor = one(objects, "PodMonitor", "tpmodel-models")["spec"]
    labels = names.gang_labels("m", "m-0-abcde", 0, "abcde")
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    for rule in monitor["podMetricsEndpoints"][0]["relabelings"]:
        known = {"__meta_kubernetes_pod_label_" + re.sub(r"[^a-zA-Z0-9]", "_", label) for label in labels}
        assert set(rule["sourceLabels"]) <= known


def test_pod_monitors_name_the_metrics_port_of_the_workers() -> None:
    from tpmodel_operator.actions import EnsureGang
    from tpmodel_operator.api import TPModel, TPModelSpec
    from tpmodel_operator.resources import container

    spec = TPModelSpec.model_validate({"model": {"uri": "pvc://models"}})
    gang = EnsureGang(name="m-0-abcde", index=0, revision="abcde", image="worker:1", attempt=1)
    ports = container.build(TPModel(name="m", namespace="n", uid="u", generation=1, spec=spec), gang)["ports"]
    objects = rendered({"monitoring": {"podMonitor": {"enabled": True}}})
    endpoint = one(objects, "PodMonitor", "tpmodel-models")["spec"]["podMetricsEndpoints"][0]
    assert endpoint["port"] in {port["name"] for port in ports}


# --------------------------------------------------------------------------------------------------- dashboard


def expressions(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node[key] for key in ("expr", "definition") if isinstance(node.get(key), str)]
        return own + [found for child in node.values() for found in expressions(child)]
    return [found for child in node for found in expressions(child)] if isinstance(node, list) else []


def exposed_metrics() -> set[str]:
    """Names of all time series, without the suffix of buckets."""
    operator = {
        sample.name.removesuffix("_bucket")
        for family in Metrics().registry.collect()
        for sample in [*family.samples, *_series(family)]
    }
    source = "".join((WORKER / part / "metrics.py").read_text() for part in ("engine", "api"))
    worker = set(re.findall(r'"(tpmodel_[a-z_]+)"', source))
    return operator | worker | {f"{name}_total" for name in worker}


def _series(family: Any) -> list[Any]:
    """A counter with labels has no sample before its first use."""
    suffix = "_total" if family.type == "counter" else ""
    return [type("Sample", (), {"name": family.name + suffix})()]


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((CHART / "dashboards" / "tpmodel.json").read_text())
    asked = {
        name.removesuffix("_bucket")
        for expression in expressions(board)
        for name in re.findall(r"\btpmodel_[a-z_]+", expression)
    }
    assert len(asked) > 20
    assert asked - exposed_metrics() == set()


def test_the_dashboards_panels_do_not_overlap() -> None:
    board = json.loads((CHART / "dashboards" / "tpmodel.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + across, place["y"] + down) for across in range(place["w"]) for down in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_dashboard_reaches_grafana_unchanged() -> None:
    objects = rendered({"monitoring": {"dashboard": {"enabled": True, "namespace": "grafana"}}})
    config_map = one(objects, "ConfigMap")
    assert config_map["metadata"]["namespace"] == "grafana"
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config_map["data"]["tpmodel.json"]) == json.loads(
        (CHART / "dashboards" / "tpmodel.json").read_text()
    )


# ------------------------------------------------------------------------------------------ the rendered file


def test_the_rendered_file_has_no_trace_of_helm() -> None:
    text = (ROOT / "deploy" / "tpmodel.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    assert documents[0] == {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    assert {"CustomResourceDefinition", "Deployment", "ClusterRole"} <= {document["kind"] for document in documents}
    assert [word for word in ("helm.sh/", "managed-by: Helm", "helm-test") if word in text] == []


def test_the_charts_version_is_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in pyproject
    assert chart["version"] == chart["appVersion"]


def test_the_chart_packs(tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["tpmodel-0.1.0.tgz"]

"""Writes what is made from the operator's code and the chart: the chart's CRD, docs/reference.md, deploy/tpmodel.yaml.

`make manifests` runs it. With --check nothing is written, and files that differ are named.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import binaries
from tpmodel_operator import crd, reference

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts" / "tpmodel"
CRD_TEMPLATE = CHART / "templates" / "crds" / "tpmodels.yaml"
REFERENCE = ROOT / "docs" / "reference.md"
DEPLOY = ROOT / "deploy" / "tpmodel.yaml"
NAMESPACE = "tpmodel-system"

_DEPLOY_HEAD = f"""\
# tpmodel without Helm: CRD, operator and roles, in namespace {NAMESPACE}.
#   kubectl apply --server-side -f tpmodel.yaml
# Made from the chart by `make manifests`; do not edit.
"""


def chart_crd() -> str:
    """The CRD as a template of the chart."""
    text = crd.to_yaml(crd.render())
    if "{{" in text:
        raise ValueError("Helm would take a part of the CRD for a template")
    head, _, rest = text.partition("  name: ")
    keep = (
        "  {{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{- end }}\n"
        '  labels:\n    {{- include "tpmodel.labels" . | nindent 4 }}\n'
    )
    return f"{{{{- if .Values.crds.enabled }}}}\n{head}{keep}  name: {rest}{{{{- end }}}}\n"


def deploy() -> str:
    """One file for those without Helm."""
    command = [helm(), "template", "tpmodel", str(CHART), "--namespace", NAMESPACE, "--skip-tests"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    documents = [document for document in yaml.safe_load_all(rendered) if document]
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    texts = [crd.to_yaml(_without_helm(document)) for document in [namespace, *documents]]
    return _DEPLOY_HEAD + "---\n" + "---\n".join(texts)


def helm() -> str:
    """The program: $HELM, else the one that the test cluster builds."""
    return os.environ.get("HELM") or str(binaries.path(binaries.HELM))


def outputs() -> dict[Path, str]:
    """All files with their contents. The chart's CRD must be in place before the chart is rendered."""
    return {CRD_TEMPLATE: chart_crd(), REFERENCE: reference.render(), DEPLOY: deploy()}


def _without_helm(node: Any) -> Any:
    """Without what only Helm reads, at any depth."""
    if isinstance(node, dict):
        kept = {
            key: _without_helm(value)
            for key, value in node.items()
            if not str(key).startswith("helm.sh/") and (key, value) != ("app.kubernetes.io/managed-by", "Helm")
        }
        return {key: value for key, value in kept.items() if not (key == "annotations" and value == {})}
    return [_without_helm(item) for item in node] if isinstance(node, list) else node


def main() -> None:
    """Writes the files, or compares them."""
    if "--check" not in sys.argv:
        CRD_TEMPLATE.write_text(chart_crd())
        for path, text in outputs().items():
            path.write_text(text)
        return
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not what the code and the chart make: run `make manifests`")
    sys.exit(1 if stale else 0)


if __name__ == "__main__":
    main()

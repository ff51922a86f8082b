"""The Helm chart as users render it: real `helm`, parsed manifests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import binaries

CHART = Path(__file__).parents[2] / "charts" / "tpmodel"
RELEASE = "tpmodel"
NAMESPACE = "tpmodel-system"
Json = dict[str, Any]


def helm(*arguments: str, given: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs helm; the first time on a machine it is built, which takes minutes."""
    command = [str(binaries.path(binaries.HELM)), *arguments]
    result = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120)
    assert not check or result.returncode == 0, result.stderr
    return result


def template(
    values: Json | None = None, *, release: str = RELEASE, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`helm template` with these values over the chart's own."""
    arguments = ["template", release, str(CHART), "--namespace", NAMESPACE, "--values", "-"]
    return helm(*arguments, given=yaml.safe_dump(values or {}), check=check)


def rendered(values: Json | None = None, *, release: str = RELEASE) -> list[Json]:
    """All objects."""
    return [item for item in yaml.safe_load_all(template(values, release=release).stdout) if item]


def of_kind(objects: Iterable[Json], kind: str) -> list[Json]:
    """Those of a kind."""
    return [item for item in objects if item["kind"] == kind]


def one(objects: Iterable[Json], kind: str, name: str | None = None) -> Json:
    """The one of this kind, and name."""
    found = [item for item in of_kind(objects, kind) if name is None or item["metadata"]["name"] == name]
    assert len(found) == 1, [item["metadata"]["name"] for item in found]
    return found[0]

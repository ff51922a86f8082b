"""The cluster of the end-to-end tests with the chart installed, and what a failed test leaves behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import artifacts, checkpoints
from tests.cluster import target as targets
from tests.cluster.faults import Faults
from tests.cluster.kubectl import Kubectl
from tests.cluster.local import LocalCluster
from tests.cluster.target import Target
from tests.e2e.support import evidence, manifests, release
from tests.e2e.support.clients import Client
from tests.e2e.support.release import Release

KEEP = "TPMODEL_KEEP_CLUSTER"
"""1: the cluster stays up after the tests."""
MODELS = "models"
"""The namespace of most tests' models."""
NAMESPACE_SECONDS = 180.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Gathers evidence while what failed is still there: fixtures clean up later."""
    report = yield
    found: dict[str, object] = getattr(item, "funcargs", {})
    target = found.get("target")
    if report.failed and report.when in ("setup", "call") and isinstance(target, Target):
        own = found.get("namespace")
        namespaces = [MODELS, release.NAMESPACE, *([own] if isinstance(own, str) else [])]
        folder = evidence.collect(target.kubectl, item.name, namespaces=namespaces)
        if target.local is not None:
            artifacts.collect_logs(target.local, folder / "components")
        report.sections.append(("evidence", str(folder)))
    return report


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    """A cluster that is up, with the images of the code as it is now."""
    with _ended(targets.down):
        yield targets.up()


@pytest.fixture(scope="session")
def cluster(target: Target) -> LocalCluster:
    """The same, for tests that break nodes or components."""
    if target.local is None:
        pytest.fail(f"this test breaks the cluster, so it needs the local one: unset {targets.CHOICE}")
    return target.local

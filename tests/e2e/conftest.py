"""The cluster of the end-to-end tests with the chart installed, and what a failed test leaves behind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.no_skips import fail_if_skipped
from tests.cluster import artifacts, cache, checkpoints
from tests.cluster import target as targets
from tests.cluster.faults import Faults
from tests.cluster.kubectl import Kubectl
from tests.cluster.local import LocalCluster
from tests.cluster.target import Target
from tests.e2e.support import evidence, manifests, release
from tests.e2e.support.clients import Client
from tests.e2e.support.models import DeployedModel, deployed, wait_all_gone
from tests.e2e.support.release import Release
from tests.e2e.support.restarts import STURDY
from tests.e2e.support.timings import TIMINGS, Timings

MODELS = os.environ.get("TPMODEL_TEST_NAMESPACE", "models")
"""The namespace of most tests' models. Two runs at once in one cluster need two, and must break no nodes."""
NAMESPACE_SECONDS = 180.0
CLIENT_NODE = "node1"
"""Where the client pod is: tests drain and break the others."""
TEST_SECONDS = 900
"""For one test and its fixtures: the first one may have to build the cluster's programs and images."""
FIRST = ("test_first_model",)
LAST = (
    "test_gang_isolation",
    "test_gang_restart",
    "test_operator_crash",
    "test_operator_upgrade",
    "test_apiserver_restart",
    "test_in_place",
    "test_node_failure",
    "test_helm",
    "test_uninstall",
)
"""Modules that come before and after all others, in this order. Those that share the model `sturdy` are together, and
what breaks the cluster comes late."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The plainest test first: where it fails, no other needs a look. Uninstalling comes last."""
    items.sort(key=lambda item: _place(item.path))
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


def _place(path: Path) -> int:
    order = [*FIRST, "", *LAST]
    return order.index(path.stem if path.stem in order else "")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Runs with tests that break what all share have the cluster alone; others may share it, each in a namespace."""
    alone = any("cluster" in getattr(item, "fixturenames", ()) or item.path.stem in LAST for item in session.items)
    with cache.locked("e2e", shared=not alone), cache.locked(f"e2e-{MODELS}"):
        return (yield)


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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing here may be skipped."""
    fail_if_skipped(session, Path(__file__).parent)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints how long the cluster took to get over each fault."""
    lines = list(config.stash.get(TIMINGS, Timings()).lines())
    if lines:
        terminalreporter.section("from fault to recovery")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def target() -> Iterator[Target]:
    """A cluster that is up, with the images of the code as it is now."""
    with targets.running() as target:
        yield target


@pytest.fixture(scope="session")
def cluster(target: Target) -> LocalCluster:
    """The same, for tests that break nodes or components."""
    if target.local is None:
        pytest.fail(f"this test breaks the cluster, so it needs the local one: unset {targets.CHOICE}")
    return target.local


@pytest.fixture
def faults(cluster: LocalCluster) -> Iterator[Faults]:
    """Ways to break nodes, links, API server and DNS; everything is mended when the test ends."""
    faults = Faults(cluster)
    yield faults
    faults.mend()


@pytest.fixture(scope="session")
def installed(target: Target) -> Release:
    """The chart, installed as users install it."""
    chart = Release(target)
    chart.install()
    return chart


@pytest.fixture(scope="session")
def models(target: Target, installed: Release) -> Iterator[Kubectl]:
    """A namespace that enforces Pod Security `restricted`, with the checkpoints' claim, beside a working operator.

    What tests have deployed there and deleted is gone in the end.
    """
    kubectl = _namespace(target.kubectl, MODELS)
    yield kubectl
    wait_all_gone(kubectl)


@pytest.fixture(scope="session")
def client(target: Target, models: Kubectl) -> Iterator[Client]:
    """A client pod in the models' namespace."""
    client = Client.start(models, target.worker_image, node=CLIENT_NODE if target.local is not None else "")
    yield client
    client.stop()


@pytest.fixture(scope="session")
def sturdy_model(models: Kubectl) -> Iterator[DeployedModel]:
    """A model of one gang of two pods, which many tests break in turn: starting one takes a while."""
    with deployed(models, "sturdy", **STURDY) as model:
        yield model


@pytest.fixture
def sturdy(sturdy_model: DeployedModel) -> DeployedModel:
    """The same, when it is Ready."""
    sturdy_model.wait_ready()
    return sturdy_model


@pytest.fixture(scope="session")
def timings(request: pytest.FixtureRequest) -> Timings:
    """Takes what is printed at the end of the run."""
    return request.config.stash.setdefault(TIMINGS, Timings())


@pytest.fixture
def namespace(target: Target, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, like that of `models`; removed with all it holds."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))[:40].strip("-")
    _namespace(target.kubectl, name)
    yield name
    target.kubectl.delete("namespace", name, seconds=NAMESPACE_SECONDS)
    checkpoints.delete_volumes(target.kubectl, name)


def _namespace(kubectl: Kubectl, name: str) -> Kubectl:
    kubectl.apply(manifests.restricted_namespace(name))
    checkpoints.create_claim(kubectl, name, name=manifests.CLAIM)
    return kubectl.within(name)

"""Two operator processes and one Lease: who works, who waits, and how soon the other takes over."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.crd_server import MODELS, KubeApi, serving, tpmodel
from support.operator_process import Operator, operating, wait_for

LEASE = "/apis/coordination.k8s.io/v1/namespaces/default/leases/tpmodel-operator"


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    with serving() as server:
        yield server


@contextlib.contextmanager
def pair(api: KubeApi, folder: Path) -> Iterator[tuple[Operator, Operator]]:
    """A leader and a standby."""
    kubeconfig = api.api.kubeconfig
    with operating(Operator(kubeconfig, folder / "a", name=f"{folder.name}-a")) as first:
        # The Lease of a killed process of an earlier test runs out first.
        wait_for(first.leads, seconds=25, what="a leader")
        with operating(Operator(kubeconfig, folder / "b", name=f"{folder.name}-b")) as second:
            yield first, second


def handled(api: KubeApi, name: str) -> bool:
    return "status" in api.call("GET", f"{MODELS}/{name}")


def test_one_leads_and_the_other_is_healthy_and_ready(api: KubeApi, tmp_path: Path):
    with pair(api, tmp_path) as (first, second):
        time.sleep(5)
        assert (first.leads(), second.leads()) == (True, False)
        assert second.healthy()
        assert second.ready()
        assert first.stop() == 0
        assert second.stop() == 0


def test_a_killed_leader_is_followed_within_20_seconds(api: KubeApi, tmp_path: Path):
    with pair(api, tmp_path) as (first, second):
        first.kill()
        api.create(tpmodel("after-kill", device="cpu"))
        took = wait_for(lambda: handled(api, "after-kill"), seconds=20, what="the standby's first status")
        print(f"takeover after SIGKILL: {took:.1f} s")
        assert second.leads()
        second.stop()


def test_a_leader_that_is_stopped_is_followed_within_4_seconds(api: KubeApi, tmp_path: Path):
    with pair(api, tmp_path) as (first, second):
        api.create(tpmodel("after-stop", device="cpu", replicas=0))
        first.process.send_signal(signal.SIGTERM)
        took = wait_for(second.leads, seconds=4, what="the standby's lead")
        print(f"takeover after SIGTERM: {took:.1f} s")
        assert first.process.wait(timeout=20) == 0
        second.stop()


def test_a_leader_that_was_frozen_ends_when_it_wakes(api: KubeApi, tmp_path: Path):
    with pair(api, tmp_path) as (first, second):
        first.process.send_signal(signal.SIGSTOP)
        wait_for(second.leads, seconds=20, what="the standby's lead")
        holder = api.call("GET", LEASE)["spec"]["holderIdentity"]
        first.process.send_signal(signal.SIGCONT)
        assert first.process.wait(timeout=15) == 1
        assert api.call("GET", LEASE)["spec"]["holderIdentity"] == holder == second.name
        second.stop()


def test_a_lease_that_another_holds_ends_the_process(api: KubeApi, tmp_path: Path):
    with operating(Operator(api.api.kubeconfig, tmp_path / "log", name="robbed")) as operator:
        wait_for(operator.leads, seconds=20, what="a leader")
        spec = {"holderIdentity": "somebody-else", "leaseDurationSeconds": 1}
        api.call("PATCH", LEASE, {"spec": spec}, content_type="application/merge-patch+json")
        assert operator.process.wait(timeout=10) == 1
        assert "somebody-else holds the Lease" in operator.lines()


def test_a_leader_that_cannot_reach_the_api_server_ends(api: KubeApi, tmp_path: Path):
    with operating(Operator(api.api.kubeconfig, tmp_path / "log", name="alone")) as operator:
        wait_for(operator.leads, seconds=20, what="a leader")
        api.api.apiserver.kill()
        try:
            assert operator.process.wait(timeout=20) == 1
        finally:
            api.api.start_apiserver()

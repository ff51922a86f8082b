"""An API server of a test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster import apiserver
from tests.cluster.apiserver import ApiServer
from tests.cluster.kubectl import Kubectl, KubectlError
from tests.cluster.waiting import wait_until

ROOT = Path(__file__).parents[2]
HOLD = """
from tests.cluster import apiserver
with apiserver.running() as api:
    print(api.apiserver.pid(), api.etcd.pid(), flush=True)
    api.apiserver.wait()
"""


def _config_map(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "default"}}


def _alive(api: ApiServer) -> list[int]:
    return [*api.apiserver.members(), *api.etcd.members()]


def test_two_at_a_time_know_nothing_of_each_other_and_leave_nothing() -> None:
    with apiserver.running() as first, apiserver.running() as second:
        Kubectl(first.kubeconfig, "default").apply(_config_map("one"))
        assert Kubectl(first.kubeconfig, "default").find("configmap", "one") is not None
        assert Kubectl(second.kubeconfig, "default").find("configmap", "one") is None
        assert len(_alive(first) + _alive(second)) == 4
    assert _alive(first) + _alive(second) == []
    assert not first.folder.exists()


def test_state_outlives_a_restart_and_users_have_the_rights_that_rbac_gives_them() -> None:
    with apiserver.running() as api:
        admin = Kubectl(api.kubeconfig, "default")
        admin.apply(_config_map("kept"))
        api.apiserver.kill()
        api.start_apiserver()
        assert admin.get("configmap", "kept")["metadata"]["name"] == "kept"
        nobody = Kubectl(api.user("nobody.kubeconfig", "nobody"), "default")
        with pytest.raises(KubectlError, match="forbidden"):
            nobody.list("configmaps")


def test_it_ends_with_its_user_even_if_that_one_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        pids = [int(pid) for pid in user.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(user.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(_lives, pids)), what="end of both", seconds=10)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""What a machine must have for a cluster of its own, and what is said where it has not."""

from __future__ import annotations

import os
import shutil

import pytest
from click.testing import CliRunner

from tests.cluster import binaries, requirements
from tests.cluster.__main__ import main
from tests.cluster.errors import ClusterError


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)


def test_a_user_who_is_not_root_is_told_so_and_what_works_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError) as caught:
        requirements.check()
    assert "  - root: " in str(caught.value)
    assert "make lint unit integration" in str(caught.value)


def test_everything_that_is_missing_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, root: None, empty_path: None
) -> None:
    monkeypatch.setattr(binaries, "built", lambda: False)
    with pytest.raises(ClusterError) as caught:
        requirements.check()
    said = str(caught.value)
    assert "root: " not in said
    assert "  - Go 1.26 or newer" in said
    assert "  - these packages, or apt-get to install them: " in said
    assert "containerd" in said
    assert "buildah" in said


def test_programs_that_are_built_need_no_compiler(
    monkeypatch: pytest.MonkeyPatch, root: None, empty_path: None
) -> None:
    monkeypatch.setattr(binaries, "built", lambda: True)
    with pytest.raises(ClusterError) as caught:
        requirements.check()
    assert "Go 1.26" not in str(caught.value)


def test_another_cluster_than_the_local_one_needs_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("TPMODEL_TEST_CLUSTER", "existing")
    monkeypatch.setenv("KUBECONFIG", "/somewhere")
    monkeypatch.setenv("TPMODEL_TEST_WORKER_IMAGE", "worker")
    monkeypatch.delenv("TPMODEL_TEST_OPERATOR_IMAGE", raising=False)
    result = CliRunner().invoke(main, ["check"])
    assert result.exit_code == 1
    assert "existing needs TPMODEL_TEST_OPERATOR_IMAGE too" in result.output
    monkeypatch.setenv("TPMODEL_TEST_OPERATOR_IMAGE", "operator")
    assert CliRunner().invoke(main, ["check"]).exit_code == 0

"""The chart's own test."""

from __future__ import annotations

from tests.e2e.support.release import Release


def test_helm_test_passes(installed: Release) -> None:
    output = installed.test()
    assert "Phase:          Succeeded" in output
    for found in ("the operator serves its metrics", "a TPModel is taken", "a wrong TPModel is refused"):
        assert f"ok: {found}" in output

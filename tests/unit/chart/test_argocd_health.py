"""The Argo CD health script, run by the Lua that Argo CD uses, over the conditions that the operator writes."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from support.chart import CHART
from tests.cluster import binaries
from tpmodel_operator import conditions
from tpmodel_operator.acceptance import Refusal
from tpmodel_operator.api import GangStatus, TPModelStatus
from tpmodel_operator.api_status import Failure
from tpmodel_operator.conditions import Situation

pytestmark = pytest.mark.timeout(1800)

LUA = binaries.Program(name="glua", package="github.com/yuin/gopher-lua/cmd/glua", version="v1.1.1")
SCRIPT = (CHART / "extras" / "argocd-health.lua").read_text()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def health(obj: dict[str, Any], folder: Path) -> tuple[str, str]:
    """Status and message, as Argo CD would show them."""
    program = folder / "health.lua"
    program.write_text(
        f"obj = {_lua(obj)}\nlocal function check()\n{SCRIPT}\nend\nlocal found = check()\n"
        "print(found.status)\nprint(found.message)\n"
    )
    result = subprocess.run([str(binaries.path(LUA)), str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    status, _, message = result.stdout.partition("\n")
    return status, message.rstrip("\n")


def _lua(value: Any) -> str:
    match value:
        case None:
            return "nil"
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        case list():
            return "{" + ", ".join(_lua(item) for item in value) + "}"
        case _:
            return "{" + ", ".join(f'["{key}"] = {_lua(item)}' for key, item in value.items()) + "}"


def gang(*, ready: bool, **fields: Any) -> GangStatus:
    return GangStatus(name="m-0-abcde", index=0, revision="abcde", ready=ready, **fields)


def model(situation: Situation, *, generation: int = 2, observed: int = 2) -> dict[str, Any]:
    found = conditions.conditions([], situation, generation=observed, now=NOW)
    status = TPModelStatus(observed_generation=observed, conditions=found)
    return {
        "metadata": {"name": "m", "generation": generation},
        "spec": {"replicas": situation.wanted},
        "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def situation(*gangs: GangStatus, wanted: int = 1, **fields: Any) -> Situation:
    return Situation(wanted=wanted, revision="abcde", gangs=gangs, **fields)


def test_a_model_that_nobody_has_seen_is_progressing(tmp_path: Path) -> None:
    obj = {"metadata": {"generation": 1}, "spec": {"replicas": 1}}
    assert health(obj, tmp_path) == ("Progressing", "the operator has not seen this spec yet")


def test_a_spec_newer_than_the_status_is_progressing(tmp_path: Path) -> None:
    obj = model(situation(gang(ready=True)), generation=3)
    assert health(obj, tmp_path) == ("Progressing", "the operator has not seen this spec yet")


def test_a_serving_model_is_healthy(tmp_path: Path) -> None:
    assert health(model(situation(gang(ready=True))), tmp_path) == ("Healthy", "1 of 1 gangs are ready")


def test_a_refused_model_is_degraded_with_the_remedy(tmp_path: Path) -> None:
    refusal = Refusal(reason="HostPathNotAllowed", message='use a "PersistentVolumeClaim"')
    obj = model(situation(gang(ready=True), refusal=refusal))
    assert health(obj, tmp_path) == ("Degraded", 'use a "PersistentVolumeClaim"')


def test_a_failed_gang_is_degraded_with_its_cause(tmp_path: Path) -> None:
    failure = Failure(reason="BudgetSpent", cause="RankDied", message="out of memory", time="2026-01-01T00:00:00Z")
    status, message = health(model(situation(gang(ready=False, phase="Failed", failure=failure))), tmp_path)
    assert status == "Degraded"
    assert "out of memory" in message


def test_a_starting_gang_is_progressing(tmp_path: Path) -> None:
    status, message = health(model(situation(gang(ready=False, phase="Loading"))), tmp_path)
    assert status == "Progressing"
    assert "Loading" in message


def test_a_rollout_is_progressing_while_old_gangs_serve(tmp_path: Path) -> None:
    old = GangStatus(name="m-1-zzzzz", index=1, revision="zzzzz", ready=True)
    assert health(model(situation(gang(ready=True), old, wanted=2)), tmp_path)[0] == "Progressing"


def test_a_model_without_gangs_is_suspended(tmp_path: Path) -> None:
    assert health(model(situation(wanted=0)), tmp_path) == ("Suspended", "scaled to zero")

"""Reading TPModels: what the classes take and refuse."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tpmodel_operator.api import Condition, GangStatus, TPModelSpec, TPModelStatus
from tpmodel_operator.api_types import LONGEST_TEXT

MODEL = {"uri": "hf://organisation/name"}


def test_an_unknown_field_of_the_spec_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="tensorParallel\n"):
        TPModelSpec.model_validate({"model": MODEL, "tensorParallel": 2})


def test_an_unknown_field_of_the_status_is_left_alone() -> None:
    assert TPModelStatus.model_validate({"replicas": 1, "writtenByANewerOperator": 2}).replicas == 1


def test_names_are_camel_case_outside() -> None:
    spec = TPModelSpec.model_validate({"model": MODEL, "tensorParallelSize": 4, "service": {"from": [{}]}})
    assert (spec.tensor_parallel_size, spec.service.from_) == (4, [{}])
    assert spec.model_dump(by_alias=True, exclude_defaults=True)["service"] == {"from": [{}]}


def test_a_cause_that_is_too_long_is_cut_so_that_the_status_can_be_written() -> None:
    gang = GangStatus.model_validate(
        {"name": "m-0-abcde", "index": 0, "revision": "abcde", "lastRestart": {
            "cause": "x" * 5000, "time": "2026-01-01T00:00:00Z", "attempt": 2}}
    )  # fmt: skip
    assert gang.last_restart is not None
    assert len(gang.last_restart.cause) == LONGEST_TEXT
    assert gang.last_restart.cause.endswith("...")


def test_a_condition_keeps_a_long_message() -> None:
    condition = Condition(type="Accepted", status="False", reason="R", message="m" * 5000, last_transition_time="t")
    assert len(condition.message) == 5000


@pytest.mark.parametrize("field", ["tensor_parallel_size", "replicas", "model"])
def test_a_spec_never_changes(field: str) -> None:
    spec = TPModelSpec.model_validate({"model": MODEL})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(spec, field, 3)

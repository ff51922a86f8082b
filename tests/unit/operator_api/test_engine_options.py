"""The CRD lets through no engine option that the worker would refuse minutes later, and refuses none it takes."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tpmodel_operator.engine_options import ENGINE_OPTIONS
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.configuration import ConfigurationError
from tpmodel_worker.supervisor.engine_options import read_engine_options

CANDIDATES = [
    *("", "0", "1", "2", "9", "15", "16", "17", "64", "65", "255", "256", "257", "999999999", "-1", "+1", " 1", "1 "),
    *("1.5", "30.25", "1e3", "0x10", "true", "false", "True", "yes", "auto", "nccl", "gloo", "shared_memory", "mpi"),
    *("500M", "2Gi", "2.5Gi", "1T", "2 GB", "many", "Gi", "123456789012345678"),
    *("cold", "fork", "spare"),
]
NOBODY_MISSES = {"+1", " 1", "1 ", "1e3", "2 GB", "", "999999999", "123456789012345678"}
"""Spellings that Python's numbers also take, deadlines of decades, caches of petabytes."""


def worker_takes(name: str, value: str) -> bool:
    try:
        read_engine_options([f"{name}={value}"])
    except ConfigurationError:
        return False
    return True


def test_both_know_the_same_options() -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_engine_options(["no_such_option=1"])
    assert str(caught.value).endswith("only " + ", ".join(ENGINE_OPTIONS))


@pytest.mark.parametrize("name", ENGINE_OPTIONS)
def test_what_the_crd_lets_through_the_worker_takes(name: str) -> None:
    accepted = [value for value in CANDIDATES if re.search(ENGINE_OPTIONS[name].pattern, value)]
    assert accepted != []
    assert [value for value in accepted if not worker_takes(name, value)] == []


@pytest.mark.parametrize("name", ENGINE_OPTIONS)
def test_what_the_worker_takes_the_crd_lets_through(name: str) -> None:
    refused = [value for value in CANDIDATES if not re.search(ENGINE_OPTIONS[name].pattern, value)]
    assert {value for value in refused if worker_takes(name, value)} <= NOBODY_MISSES


def test_the_defaults_that_users_read_are_the_workers() -> None:
    from tpmodel_operator.api import ModelSource

    described = " ".join((ModelSource.model_fields["engine_options"].description or "").split())
    defaults = {name: value for name, value in re.findall(r"(\w+) \((\w+)\)", described) if name in ENGINE_OPTIONS}
    settings = ServeSettings(model_path="", model_id="", served_name="")
    assert len(defaults) == 11
    assert {name: str(getattr(settings, name)).lower().removesuffix(".0") for name in defaults} == defaults


def test_the_least_step_deadline_that_users_read_is_the_workers() -> None:
    from tpmodel_operator.api import ModelSource

    described = " ".join((ModelSource.model_fields["engine_options"].description or "").split())
    cuda, cpu = re.findall(r"step_deadline \((\d+), on cpu (\d+)\)", described)[0]
    settings = ServeSettings(model_path="", model_id="", served_name="", device="cuda")
    assert settings.least_step_deadline == float(cuda)
    assert dataclasses.replace(settings, device="cpu").least_step_deadline == float(cpu)
    assert dataclasses.replace(settings, step_deadline=7.0).least_step_deadline == 7.0

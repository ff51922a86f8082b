"""What users get wrong, and what a real API server answers: every message says what to write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.crd_server import KubeApi, RefusedError, serving, tpmodel
from support.wrong_tpmodels import HUB, WRONG


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with serving() as api:
        yield api


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_spec_is_refused_with_what_to_write(server: KubeApi, what: str) -> None:
    spec, field, message = WRONG[what]
    with pytest.raises(RefusedError) as caught:
        server.create(tpmodel(**spec), dry_run=True)
    assert caught.value.code == 422
    assert [(cause[0], _without_value(cause[1])) for cause in caught.value.causes] == [(field, message)]


def _without_value(message: str) -> str:
    """The API server puts the kind of the value before the message."""
    for kind in ("object", "string", "integer", "array"):
        message = message.removeprefix(f'Invalid value: "{kind}": ')
    return message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "m" * 43,
            "metadata.name is too long: pods and Services are named after it, write at most 42 characters",
        ),
        (
            "qwen3.8b",
            (
                "metadata.name also names Services: write lower-case letters, digits and '-', beginning with a letter, "
                "such as qwen3-8b"
            ),
        ),
        (
            "8b",
            (
                "metadata.name also names Services: write lower-case letters, digits and '-', beginning with a letter, "
                "such as qwen3-8b"
            ),
        ),
    ],
)
def test_a_name_that_children_cannot_have_is_refused(server: KubeApi, name: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        server.create(tpmodel(name), dry_run=True)
    assert [_without_value(text) for _, text in caught.value.causes] == [message]


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        ({"model": {"uri": HUB, "quantization": "fp8"}}, "spec.model.quantization", 'supported values: "none"'),
        ({"device": "rocm"}, "spec.device", 'supported values: "cuda", "cpu"'),
        ({"tensorParallelSize": 0}, "spec.tensorParallelSize", "should be greater than or equal to 1"),
        ({"replicas": -1}, "spec.replicas", "should be greater than or equal to 0"),
        ({"drainTimeout": 100_000}, "spec.drainTimeout", "should be less than or equal to 86400"),
        ({"recovery": {"formationDeadline": 1}}, "spec.recovery.formationDeadline", "greater than or equal to 10"),
        ({"model": {}}, "spec.model.uri", "Required value"),
        ({"env": [{"name": "A"}, {"name": "A"}]}, "spec.env[1]", 'Duplicate value: {"name":"A"}'),
    ],
)
def test_bounds_and_choices_are_named(server: KubeApi, spec: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        server.create(tpmodel(**spec), dry_run=True)
    refused = dict(caught.value.causes)
    assert message in refused[field]


@pytest.mark.parametrize("typo", ["tensorParallel", "gpuResource", "minReplicas"])
def test_an_unknown_field_is_refused_by_name(server: KubeApi, typo: str) -> None:
    with pytest.raises(RefusedError, match=f'unknown field \\\\?"spec.{typo}'):
        server.create(tpmodel("typo", **{typo: 2}), dry_run=True)

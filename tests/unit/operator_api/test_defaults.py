"""What a TPModel means where it leaves something out."""

from __future__ import annotations

from typing import Any

import pytest

from tpmodel_operator import defaults
from tpmodel_operator.api import TPModelSpec


def spec(uri: str = "hf://organisation/name", **fields: Any) -> TPModelSpec:
    return TPModelSpec.model_validate({"model": {"uri": uri}} | fields)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 1), (2, 2), (6, 6), (8, 8), (12, 6), (16, 8), (7, 7), (11, 1), (9, 3)]
)
def test_on_cuda_a_pod_gets_the_largest_divisor_up_to_eight(size: int, expected: int) -> None:
    assert defaults.ranks_per_pod(spec(tensorParallelSize=size)) == expected


def test_on_cpu_a_pod_gets_one_rank() -> None:
    assert defaults.ranks_per_pod(spec(tensorParallelSize=8, device="cpu")) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_written_wins(device: str) -> None:
    assert defaults.ranks_per_pod(spec(tensorParallelSize=16, ranksPerPod=16, device=device)) == 16


@pytest.mark.parametrize(("fields", "expected"), [({}, 2), ({"ranksPerPod": 2}, 8), ({"device": "cpu"}, 16)])
def test_pods_of_a_gang(fields: dict[str, Any], expected: int) -> None:
    assert defaults.pods_per_gang(spec(tensorParallelSize=16, **fields)) == expected


def test_most_pods_counts_the_surge() -> None:
    assert defaults.most_pods(spec(tensorParallelSize=16, replicas=3, rollout={"maxSurge": 1})) == 8


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "nvidia.com/gpu"),
        ({"gpuResourceName": "amd.com/gpu"}, "amd.com/gpu"),
        ({"device": "cpu"}, ""),
        ({"resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "eight"}]}, ""),
    ],
)
def test_gpu_resource(fields: dict[str, Any], expected: str) -> None:
    assert defaults.gpu_resource(spec(**fields)) == expected


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://Qwen/Qwen3-8B", ("hf", "Qwen/Qwen3-8B", "")),
        ("pvc://models/llama/8b/", ("pvc", "models", "llama/8b")),
        ("pvc://models", ("pvc", "models", "")),
        ("file:///var/lib/models/x", ("file", "", "/var/lib/models/x")),
        ("oci://registry.example/models/x:1", ("oci", "registry.example/models/x:1", "")),
    ],
)
def test_model_location(uri: str, expected: tuple[str, str, str]) -> None:
    assert defaults.model_location(uri) == expected


@pytest.mark.parametrize("uri", ["s3://bucket/x", "hf://", "Qwen/Qwen3-8B", ""])
def test_a_uri_of_another_kind_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="write hf://"):
        defaults.model_location(uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("pvc://models/llama/8b", "8b"),
        ("pvc://models", "models"),
        ("file:///var/lib/models/x", "x"),
        ("oci://registry.example:5000/models/x:1", "x"),
        ("oci://registry.example/models/x@sha256:abc", "x"),
    ],
)
def test_served_name_is_the_last_part_of_the_uri(uri: str, expected: str) -> None:
    assert defaults.served_name(spec(uri)) == expected


def test_served_name_as_written() -> None:
    assert defaults.served_name(spec(model={"uri": "pvc://models", "servedName": "mine"})) == "mine"


def test_claims_of_model_and_cache_once_each() -> None:
    cache = {"type": "pvc", "claimName": "shared"}
    assert defaults.claims(spec("pvc://shared/model", cache=cache)) == ("shared",)
    assert defaults.claims(spec("pvc://models/x", cache=cache)) == ("models", "shared")
    assert defaults.claims(spec()) == ()

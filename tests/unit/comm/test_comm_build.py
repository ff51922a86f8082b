"""Which communicator a world gets, what is refused before anything is connected, and worlds of one rank."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.rank_link import RankLink
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.comm.build import CommunicatorSpec, build_communicator
from tpmodel_worker.comm.communicator import (
    CollectiveArgumentError,
    CommunicatorAbortedError,
    CommunicatorError,
)

CPU = torch.device("cpu")
SPEC = CommunicatorSpec(
    epoch=1,
    rank=0,
    world_size=2,
    rendezvous="127.0.0.1:1",
    rendezvous_id="one",
    timeout_seconds=0.2,
    pods=("a", "a"),
)
ONE = dataclasses.replace(SPEC, world_size=1, pods=("a",))


@pytest.fixture
def arenas(tmp_path: Path) -> Iterator[ArenaClient]:
    with RankLink(tmp_path / "rank.sock") as holder, ArenaClient(holder.path) as client:
        yield client


@pytest.mark.parametrize(
    ("kind", "pods", "device", "expected"),
    [
        ("auto", ("a", "a"), "cpu", "shared_memory"),
        ("auto", ("a", "b"), "cpu", "gloo"),
        ("auto", ("a", "b"), "cuda", "nccl"),
        ("auto", ("a", "a"), "cuda", "nccl"),
        ("gloo", ("a", "a"), "cpu", "gloo"),
        ("gloo", ("a", "a"), "cuda", "gloo"),
        ("shared_memory", ("a", "a"), "cpu", "shared_memory"),
        ("nccl", ("a", "a"), "cuda", "nccl"),
        ("gloo", ("a",), "cpu", "single"),
        ("auto", ("a",), "cuda", "single"),
    ],
)
def test_kind_follows_from_device_and_pods(kind: str, pods: tuple[str, ...], device: str, expected: str) -> None:
    spec = dataclasses.replace(SPEC, kind=kind, pods=pods, world_size=len(pods))
    assert spec.resolve_kind(device) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 0, "pods": ()}, "world size 0: expected at least 1"),
        ({"rank": 2}, "rank 2: rank 2: expected 0 to 1"),
        ({"pods": ("a",)}, "rank 0: expected the pods of 2 ranks, got 1"),
        ({"kind": "carrier pigeon"}, "unknown communicator 'carrier pigeon'"),
        ({"kind": "nccl"}, "nccl is for cuda, the device is cpu"),
        ({"kind": "single"}, "single is for one rank, the world has 2"),
        ({"kind": "shared_memory", "pods": ("a", "b")}, "shared_memory needs all ranks in one pod"),
        ({"timeout_seconds": 0.0}, "expected more than 0"),
        ({"rendezvous": "somewhere"}, "rendezvous 'somewhere': expected host:port"),
    ],
)
def test_impossible_world_is_refused_by_name(arenas: ArenaClient, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CommunicatorError, match=message):
        build_communicator(dataclasses.replace(SPEC, **changes), device=CPU, arenas=arenas)


def test_missing_rendezvous_is_an_error_within_the_timeout(arenas: ArenaClient) -> None:
    started = time.monotonic()
    with pytest.raises(CommunicatorError, match=r"rank 0: no rendezvous at 127\.0\.0\.1:1: .*refused"):
        build_communicator(SPEC, device=CPU, arenas=arenas)
    assert time.monotonic() - started < 2


class TestSingle:
    def test_collectives_are_the_identity(self, arenas: ArenaClient) -> None:
        communicator = build_communicator(ONE, device=CPU, arenas=arenas)
        tensor = torch.arange(6.0).view(2, 3)
        assert communicator.name == "single"
        assert torch.equal(communicator.all_reduce(tensor.clone()), tensor)
        assert torch.equal(communicator.broadcast(tensor.clone(), 0), tensor)
        output = torch.empty(2, 3)
        gathered = communicator.all_gather(tensor, [output])
        assert gathered.shape == (1, 2, 3)
        assert gathered.data_ptr() != tensor.data_ptr()
        assert torch.equal(output, tensor)
        communicator.barrier()
        communicator.close()

    def test_arguments_are_checked_as_in_any_world(self, arenas: ArenaClient) -> None:
        """W23."""
        communicator = build_communicator(ONE, device=CPU, arenas=arenas)
        with pytest.raises(CollectiveArgumentError, match="expected 1 tensors, got 2"):
            communicator.all_gather(torch.ones(1), [torch.ones(1)] * 2)
        with pytest.raises(CollectiveArgumentError, match="root 1 is not a rank"):
            communicator.broadcast(torch.ones(1), 1)
        with pytest.raises(CollectiveArgumentError, match="tensor 0 is on meta, expected cpu"):
            communicator.all_reduce(torch.ones(1, device="meta"))

    def test_aborted_epoch_ends_here_too(self, arenas: ArenaClient) -> None:
        communicator = build_communicator(ONE, device=CPU, arenas=arenas)
        communicator.abort("newer epoch")
        communicator.abort("again")
        with pytest.raises(CommunicatorAbortedError, match="newer epoch"):
            communicator.barrier()

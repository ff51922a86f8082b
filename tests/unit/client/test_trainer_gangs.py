"""A trainer with several gangs: all at once, one by one, gangs that come and go, and what a failure leaves."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from support.stand_in_trainee import SHAPES, Trainee
from tpmodel.trainer import GangsDifferError, Trainer, UpdateOptions, UpdateOrderError, WeightUpdateError, connect
from tpmodel.trainer.discovery import Targets

TOKEN = "a trainer's token"
OPTIONS = UpdateOptions(join_seconds=30, deadline_seconds=30)
NAME = "dns:///chat-trainers.space.svc"


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, float(value)) for name, shape in SHAPES.items()}


def has(gang: Trainee, value: float) -> bool:
    return all(torch.equal(gang.weights[name], tensor) for name, tensor in weights(value).items())


@pytest.fixture
def gangs() -> Iterator[list[Trainee]]:
    """Three, at one port of different addresses, as the pods of a Service are."""
    with ExitStack() as stack:
        first = stack.enter_context(Trainee(TOKEN))
        others = [stack.enter_context(Trainee(TOKEN, f"127.0.0.{number}", first.port)) for number in (2, 3)]
        yield [first, *others]


class Names:
    """The name server: which addresses the name has now."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self._real = socket.getaddrinfo

    def __call__(self, host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        if host != NAME.removeprefix("dns:///"):
            return self._real(host, port, *arguments, **options)
        if not self.addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names(["127.0.0.1", "127.0.0.2"])
    monkeypatch.setattr(socket, "getaddrinfo", names)
    return names


def connected(gangs: list[Trainee], count: int = 2) -> Trainer:
    return connect([gang.target for gang in gangs[:count]], token=TOKEN, options=OPTIONS)


# ---------------------------------------------------------------------------------- all at once, one by one


def test_all_at_once_every_gang_is_in_one_group(gangs: list[Trainee]) -> None:
    with connected(gangs) as trainer:
        trainer.send_weights(weights(1), version=1)
        assert trainer.versions() == [1, 1]
    for gang in gangs[:2]:
        assert has(gang, 1)
        assert gang.steps.count("init") == 1


def test_one_by_one_a_gang_begins_when_the_one_before_has_finished(gangs: list[Trainee]) -> None:
    seen: list[tuple[int | None, int | None]] = []

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        seen.append((gangs[0].version, gangs[1].version))
        yield from weights(1).items()

    with connected(gangs) as trainer:
        trainer.send_weights(pairs, version=1, gangs="one_by_one")
        assert trainer.versions() == [1, 1]
    assert seen == [(0, 0), (1, 0)]
    assert all(has(gang, 1) for gang in gangs[:2])


def test_one_by_one_the_groups_are_kept_for_the_next_update(gangs: list[Trainee]) -> None:
    with connected(gangs) as trainer:
        trainer.send_weights(weights(1), version=1, gangs="one_by_one")
        joined = gangs[0].steps.count("init")
        trainer.send_weights(weights(2), version=2, gangs="one_by_one")
        assert gangs[0].steps.count("init") == joined
        trainer.send_weights(weights(3), version=3)
    assert all(has(gang, 3) for gang in gangs[:2])


def test_an_iterator_is_refused_where_it_would_be_needed_again(gangs: list[Trainee]) -> None:
    with connected(gangs) as trainer:
        with pytest.raises(ValueError, match="a function that makes the pairs anew"):
            trainer.send_weights(iter(weights(1).items()), version=1, gangs="one_by_one")
        assert trainer.versions() == [0, 0]
        with pytest.raises(ValueError, match="all_at_once or one_by_one"):
            trainer.send_weights(weights(1), version=1, gangs="some")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("step", ["start", "update", "finish"])
def test_a_failure_says_who_has_which_version_and_is_gone_on_with(gangs: list[Trainee], step: str) -> None:
    with connected(gangs, 3) as trainer:
        gangs[1].fails_at = step
        with pytest.raises(GangsDifferError, match=rf"{step} fails.*{gangs[0].target} serves version 1") as caught:
            trainer.send_weights(weights(1), version=1, gangs="one_by_one")
        failed = 0 if step == "start" else gangs[1].version
        assert caught.value.served == {gangs[0].target: 1, gangs[1].target: failed, gangs[2].target: 0}
        assert (caught.value.version, caught.value.code) == (1, "ABORTED")
        finished = gangs[0].steps.count("finish")
        trainer.join()
        trainer.send_weights(weights(1), version=1, gangs="one_by_one")
        assert trainer.versions() == [1, 1, 1]
        assert gangs[0].steps.count("finish") == finished, "who serves the version is left out"


def test_all_at_once_a_gang_that_has_committed_is_left_out_when_the_version_is_sent_again(gangs: list[Trainee]) -> None:
    with connected(gangs) as trainer:
        gangs[1].fails_at = "finish"
        with pytest.raises(GangsDifferError):
            trainer.send_weights(weights(1), version=1)
        trainer.join()
        trainer.send_weights(weights(1), version=1)
        assert trainer.versions() == [1, 1]
    assert gangs[0].steps.count("finish") == 1


@pytest.mark.parametrize("how", ["all_at_once", "one_by_one"])
def test_a_version_that_a_gang_has_had_is_refused_before_it_is_touched(gangs: list[Trainee], how: Any) -> None:
    """After the tensors have come, a refusal would leave it without whole weights."""
    gangs[1].version, gangs[1].newest = None, 3
    with connected(gangs) as trainer:
        with pytest.raises(GangsDifferError, match=rf"{gangs[1].target}: version 3 does not follow version 3"):
            trainer.send_weights(weights(3), version=3, gangs=how)
        assert not [gang for gang in gangs if "start" in gang.steps]
        trainer.send_weights(weights(4), version=4, gangs=how)
        assert trainer.versions() == [4, 4]


def test_a_single_gang_fails_with_its_own_words(gangs: list[Trainee]) -> None:
    with connected(gangs, 1) as trainer:
        gangs[0].fails_at = "finish"
        with pytest.raises(WeightUpdateError, match="finish fails") as caught:
            trainer.send_weights(weights(1), version=1)
        assert not isinstance(caught.value, GangsDifferError)
        with pytest.raises(UpdateOrderError, match=r"join\(\) first"):
            trainer.send_weights(weights(1), version=1)


def test_a_gang_with_another_token_does_not_get_in(gangs: list[Trainee]) -> None:
    with Trainee("another token") as stranger, pytest.raises(WeightUpdateError):
        connect([gangs[0].target, stranger.target], token=TOKEN, options=OPTIONS)


# ------------------------------------------------------------------------------------- gangs come and go


@pytest.mark.parametrize("how", ["all_at_once", "one_by_one"])
def test_gangs_of_a_name_are_those_that_there_are_before_every_update(
    gangs: list[Trainee], names: Names, how: Any
) -> None:
    with connect(f"{NAME}:{gangs[0].port}", token=TOKEN, options=OPTIONS) as trainer:
        trainer.send_weights(weights(1), version=1, gangs=how)
        names.addresses = ["127.0.0.3", "127.0.0.2"]
        trainer.send_weights(weights(2), version=2, gangs=how)
        assert trainer.targets == [gangs[1].target, gangs[2].target]
        assert trainer.versions() == [2, 2]
    assert [gang.version for gang in gangs] == [1, 2, 2]
    assert all(has(gang, 2) for gang in gangs[1:])


def test_a_gang_that_has_a_new_world_is_joined_anew(gangs: list[Trainee], names: Names) -> None:
    with connect(f"{NAME}:{gangs[0].port}", token=TOKEN, options=OPTIONS) as trainer:
        trainer.send_weights(weights(1), version=1)
        gangs[1].lose_world()
        trainer.send_weights(weights(2), version=2)
    assert all(has(gang, 2) for gang in gangs[:2])


def test_after_a_failure_gangs_of_a_name_are_joined_by_the_next_update(gangs: list[Trainee], names: Names) -> None:
    with connect(f"{NAME}:{gangs[0].port}", token=TOKEN, options=OPTIONS) as trainer:
        gangs[1].fails_at = "update"
        with pytest.raises(GangsDifferError):
            trainer.send_weights(weights(1), version=1)
        trainer.send_weights(weights(1), version=1)
        assert trainer.versions() == [1, 1]
        trainer.close()
        with pytest.raises(UpdateOrderError):
            trainer.send_weights(weights(2), version=2)


def test_a_gang_that_is_gone_from_the_name_is_not_waited_for(gangs: list[Trainee], names: Names) -> None:
    """It may still be among the addresses for a while: they are looked up until all of them answer."""
    names.addresses = ["127.0.0.1", "127.0.0.9"]
    looked: list[int] = []
    real = Targets.now

    def now(targets: Targets) -> list[str]:
        looked.append(1)
        if len(looked) > 2:
            names.addresses = ["127.0.0.1"]
        return real(targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Targets, "now", now)
        with connect(f"{NAME}:{gangs[0].port}", token=TOKEN, options=OPTIONS) as trainer:
            assert trainer.targets == [gangs[0].target]


def test_a_name_without_addresses_says_so(names: Names) -> None:
    names.addresses = []
    with pytest.raises(WeightUpdateError, match=r"dns:///chat-trainers.* no gang is found under this name"):
        connect(f"{NAME}:9001", token=TOKEN)


@pytest.mark.parametrize("target", ["chat", "dns:///chat", "http://chat:9001", ":9001", "chat:port"])
def test_a_target_that_is_none_is_refused_with_what_to_write(target: str) -> None:
    with pytest.raises(ValueError, match="write host:port, or dns:///host:port"):
        Targets(target)


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no gang to connect to"):
        Targets([])

"""What a trainer has got wrong is named before anything moves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import torch

from support.stand_in_trainee import SHAPES, Trainee
from tpmodel.trainer import UpdateOptions, WeightUpdateError, connect

TOKEN = "a trainer's token"
WEIGHTS = {name: torch.zeros(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def gang() -> Iterator[Trainee]:
    with Trainee(TOKEN) as trainee:
        yield trainee


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer_size": "1M"}, "buffer_size is '1M': a whole number"),
        ({"group_bytes": 1e9}, "group_bytes is 1000000000.0: a whole number"),
        ({"buffer_count": None}, "buffer_count is None: a whole number"),
        ({"buffer_count": 17}, "buffer_count is 17: 1 to 16"),
        ({"deadline_seconds": "60"}, "deadline_seconds is '60': a number of seconds"),
        ({"join_seconds": 0}, "join_seconds 0, .*: above 0"),
        ({"device": "gpu"}, "device is 'gpu': cpu, cuda or cuda:N"),
        ({"device": 0}, "device is 0: cpu, cuda or cuda:N"),
        ({"mode": "quick"}, "mode is 'quick': in_place or shadow"),
        ({"speed": 1}, "unknown option 'speed'"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateOptions.of(options)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "the token is missing"),
        (None, "the token is missing"),
        (f"{TOKEN}\n", "one line of printable ASCII characters, without the line's end"),
        ("schlüssel", "printable ASCII"),
    ],
)
def test_a_token_that_no_call_can_present_is_refused(gang: Trainee, token: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connect(gang.target, token=token)
    assert gang.steps == []


def test_a_port_without_weight_updates_is_called_so() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(WeightUpdateError, match=f"127.0.0.1:{port} is no control port"):
            connect(f"127.0.0.1:{port}", token=TOKEN)
    finally:
        server.stop(None).wait()


def test_an_address_of_another_machine_is_named(gang: Trainee) -> None:
    """192.0.2.1 is nobody's: it is for documents."""
    with pytest.raises(WeightUpdateError, match=r"cannot listen at address 192\.0\.2\.1, which has to be one of this"):
        connect(gang.target, token=TOKEN, options={"address": "192.0.2.1"})
    assert "init" not in gang.steps


@pytest.mark.parametrize("version", ["1", 1.5, None, 1 << 64])
def test_a_version_that_is_no_whole_number_is_refused_before_anything_is_paused(gang: Trainee, version: Any) -> None:
    with connect(gang.target, token=TOKEN) as trainer:
        with pytest.raises(ValueError, match=r"version is .*: a whole number"):
            trainer.send_weights(WEIGHTS, version=version)
        with pytest.raises(ValueError, match=r"version is .*: a whole number"), trainer.update(version):
            pass
        assert "start" not in gang.steps


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "weights is a NoneType: give a mapping such as model.state_dict()"),
        (torch.nn.Linear(1, 1), "weights is a Linear: give a mapping such as model.state_dict()"),
        ({"first": [1.0]}, "first is a list: weights are tensors of torch"),
    ],
)
def test_what_are_no_weights_is_refused_before_anything_is_paused(gang: Trainee, weights: Any, message: str) -> None:
    with connect(gang.target, token=TOKEN) as trainer:
        with pytest.raises(ValueError, match=re.escape(message)):
            trainer.send_weights(weights, version=1)
        assert "start" not in gang.steps

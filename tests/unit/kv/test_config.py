"""How an end of a pipe is described."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpmodel_worker.kv.config import KvPipeConfig

CONFIG: dict[str, Any] = {
    "rank": 0,
    "address": "127.0.0.1",
    "master_address": "127.0.0.1",
    "base_port": 14_579,
    "token": "secret",
}


def test_cuda_is_the_local_ranks_device_and_anything_else_the_cpu() -> None:
    """K47."""
    assert KvPipeConfig(**CONFIG, device="cuda", local_rank=3).resolve_device() == torch.device("cuda", 3)
    for other in ("cpu", "", "xpu"):
        assert KvPipeConfig(**CONFIG, device=other, local_rank=3).resolve_device() == torch.device("cpu")


def test_the_port_is_base_plus_offset_and_the_store_waits_300_s() -> None:
    """K48."""
    assert KvPipeConfig(**CONFIG, port_offset=7).port == 14_586
    assert KvPipeConfig(**CONFIG).store_timeout_seconds == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": ""}, "token is empty"),
        ({"rank": 2}, "rank 2: expected 0 to 1"),
        ({"world_size": 1}, "world_size 1"),
        ({"port_offset": 60_000}, "expected 1 to 65535"),
        ({"send_limit_bytes": -1}, "send_limit_bytes must not be negative"),
        ({"deadline_seconds": 0}, "deadline_seconds must be positive"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KvPipeConfig(**(CONFIG | changes))

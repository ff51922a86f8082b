"""Requests that one gang on GPUs prefills and another one continues."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import ARCHITECTURES, make_checkpoint, random_prompts
from support.handover import all_blocks_back, hand_over, make_server, start_all, stop_all
from tpmodel import Client
from tpmodel.local import LocalServer

pytestmark = pytest.mark.gpu

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}
PROMPTS = random_prompts(3, shortest=200, longest=400, vocabulary=512, seed=9)
# Ranks of one GPU: both gangs' bytes go through the memory of the host.
OPTIONS = ["--share-devices", "--kv-cache-memory", "64M"]


def check(prefill: LocalServer, decode: LocalServer) -> None:
    """Greedy and sampled streams go on with the tokens of one gang."""
    try:
        start_all([prefill, decode])
        for options in (GREEDY, GREEDY | {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}):
            with Client(prefill.target) as client:
                whole = [client.complete(prompt, **options).token_ids[0] for prompt in PROMPTS]
            handed = [hand_over(prefill, decode, prompt, **options)[1].token_ids[0] for prompt in PROMPTS]
            assert handed == whole
        all_blocks_back(prefill, decode)
    finally:
        stop_all([server for server in (prefill, decode) if server.output])


@pytest.mark.parametrize("tp", [1, 2])
def test_on_one_gpu_the_stream_goes_on_with_the_tokens_of_one_gang(tp: int, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    prefill = make_server(tmp_path, checkpoint, tp, options=OPTIONS, device="cuda")
    check(prefill, make_server(tmp_path, checkpoint, tp, prefill, options=OPTIONS, device="cuda"))


def test_on_one_gpu_recurrent_state_goes_too(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **ARCHITECTURES["qwen3_next"])
    prefill = make_server(tmp_path, checkpoint, 1, options=OPTIONS, device="cuda")
    check(prefill, make_server(tmp_path, checkpoint, 1, prefill, options=OPTIONS, device="cuda"))


def test_between_two_gpus_the_bytes_go_over_nccl(tmp_path: Path) -> None:
    """Needs two: the second gang sees only the second one."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    prefill = make_server(tmp_path, checkpoint, 1, options=OPTIONS, device="cuda")
    second = {"environment": os.environ | {"CUDA_VISIBLE_DEVICES": "1"}}
    check(prefill, make_server(tmp_path, checkpoint, 1, prefill, options=OPTIONS, device="cuda", **second))

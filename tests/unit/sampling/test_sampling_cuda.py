"""The sampler on CUDA: the tokens of the CPU, and no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.sampling_world import slot_sampling
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.rank.sampling import Sampler

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 151_936
VARIETY: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.4, "top_k": 2000, "top_p": 0.7, "min_p": 0.001},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"repetition_penalty": 1.5, "logprobs": 20},
    {"temperature": 1.2, "top_k": 5, "min_tokens": 30, "stop_token_ids": [1, 200], "logprobs": 3},
]


def make_sampler(device: torch.device) -> Sampler:
    sampler = Sampler(
        SingleCommunicator(device),
        vocab_size=VOCAB_SIZE,
        vocab_start=0,
        vocab_shard=VOCAB_SIZE,
        max_slots=len(VARIETY),
        device=device,
    )
    for slot, settings in enumerate(VARIETY):
        sampler.admit(slot, slot_sampling(**settings, seed=slot), [5, 6, 7], [8, 9])
    return sampler


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_tokens_and_logprobs_equal_those_of_the_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    on_cpu, on_cuda = make_sampler(cpu), make_sampler(cuda)
    slots = range(len(VARIETY))
    active = torch.ones(len(VARIETY), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        logits = torch.randn(len(VARIETY), VOCAB_SIZE, generator=generator) * 3
        counts = torch.full((len(VARIETY),), 2 + step)
        expected = on_cpu.sample(logits, slots=slots, output_counts=counts, active=active)
        actual = on_cuda.sample(logits.cuda(), slots=slots, output_counts=counts.cuda(), active=active.cuda())
        assert actual.token_ids.tolist() == expected.token_ids.tolist()
        assert actual.logprobs is not None
        assert expected.logprobs is not None
        assert torch.equal(actual.logprobs.top_ids.cpu(), expected.logprobs.top_ids)
        torch.testing.assert_close(actual.logprobs.top_values.cpu(), expected.logprobs.top_values)
        torch.testing.assert_close(actual.logprobs.chosen.cpu(), expected.logprobs.chosen)


@pytest.mark.usefixtures("_waiting_is_an_error")
def test_nothing_waits_for_the_device():
    device = torch.device("cuda", 0)
    sampler = make_sampler(device)
    rows = len(VARIETY)
    logits = torch.zeros(rows, VOCAB_SIZE, device=device)
    active = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(3):
        sampler.sample(logits, slots=range(rows), output_counts=torch.full((rows,), step, device=device), active=active)
    sampler.release(3)
    sampler.admit(3, slot_sampling(temperature=1.0, presence_penalty=1.0), [1], [2])
    sampler.sample(
        logits[:4], slots=range(4), output_counts=torch.zeros(4, dtype=torch.int64, device=device), active=active[:4]
    )

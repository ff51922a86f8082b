"""The gated delta rule and its convolution against the plain formulas, token by token, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from support.gated_delta import TAPS, DeltaCase, make_batch, random
from tpmodel_worker.kernels.gated_delta import prepare_gated_delta
from tpmodel_worker.models.batch import LayerState

CHANNELS, SLOTS = 5, 9
SIZES = KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 8, 4


def make_state(generator, device="cpu") -> LayerState:
    recurrent = random(generator, SLOTS, VALUE_HEADS, KEY_DIM, VALUE_DIM)
    return LayerState(random(generator, SLOTS, TAPS, CHANNELS).to(device), recurrent.to(device))


def plain_rule(case, memory):
    """One sequence: outputs and the memory after it."""
    outputs = []
    sharers = VALUE_HEADS // KEY_HEADS
    decay, beta = case.gates.decay().double(), case.gates.beta().double()
    query, key, value = (part.double() for part in case.parts)
    query = F.normalize(query, dim=-1) / KEY_DIM**0.5
    key = F.normalize(key, dim=-1)
    memory = memory.double().clone()
    for token in range(len(query)):
        for head in range(VALUE_HEADS):
            unit = key[token, head // sharers]
            memory[head] *= decay[token, head].exp()
            memory[head] += torch.outer(unit, beta[token, head] * (value[token, head] - unit @ memory[head]))
        outputs.append(torch.stack([query[token, head // sharers] @ memory[head] for head in range(VALUE_HEADS)]))
    return torch.stack(outputs), memory


def check_rule(lengths, device="cpu"):
    generator = torch.Generator().manual_seed(sum(lengths))
    slots = torch.randperm(SLOTS, generator=generator)[: len(lengths)].tolist()
    case = DeltaCase.random(generator, sum(lengths), SIZES)
    state = make_state(generator, device)
    before = state.recurrent.cpu().clone()
    output = case.on(device).attend(make_batch(lengths, slots, device), state).cpu()
    after = state.recurrent.cpu()
    start = 0
    for length, slot in zip(lengths, slots, strict=True):
        expected, memory = plain_rule(case.rows(start, start + length), before[slot])
        assert float((output[start : start + length] - expected).abs().max()) < 1e-5
        assert float((after[slot] - memory).abs().max()) < 1e-5
        start += length
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(after[others], before[others])


CASES = [[1], [1, 1, 1], [2], [64], [65], [1, 150, 3, 64, 20], [5, 200, 128]]


@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_every_token_corrects_and_reads_its_sequences_memory(lengths):
    check_rule(lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_every_token_corrects_and_reads_its_sequences_memory_on_cuda(lengths):
    check_rule(lengths, "cuda")


def check_convolution(lengths, device="cpu"):
    generator = torch.Generator().manual_seed(sum(lengths))
    slots = torch.randperm(SLOTS, generator=generator)[: len(lengths)].tolist()
    features, weight = random(generator, sum(lengths), CHANNELS), random(generator, CHANNELS, 1, TAPS + 1)
    state = make_state(generator, device)
    before = state.convolution.cpu().clone()
    delta = prepare_gated_delta(make_batch(lengths, slots, device), TAPS)
    output = delta.convolve(features.to(device), weight.to(device), state).cpu()
    after = state.convolution.cpu()
    start = 0
    for length, slot in zip(lengths, slots, strict=True):
        seen = torch.cat((before[slot], features[start : start + length]))
        expected = F.silu(F.conv1d(seen.t()[None], weight, groups=CHANNELS)[0].t())
        assert float((output[start : start + length] - expected).abs().max()) < 1e-5
        assert torch.equal(after[slot], seen[-TAPS:])
        start += length
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_the_convolution_goes_on_from_the_last_tokens(lengths):
    check_convolution(lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", CASES, ids=str)
def test_the_convolution_goes_on_from_the_last_tokens_on_cuda(lengths):
    check_convolution(lengths, "cuda")


def test_a_cut_of_a_sequence_changes_nothing():
    """A prompt in chunks of odd sizes, its last tokens one by one."""
    generator = torch.Generator().manual_seed(1)
    case = DeltaCase.random(generator, 100, SIZES)
    whole_state, cut_state = (make_state(torch.Generator().manual_seed(2)) for _ in range(2))
    whole = case.attend(make_batch([100], [4]), whole_state)
    parts, start = [], 0
    for length in (7, 70, 20, 1, 1, 1):
        parts.append(case.rows(start, start + length).attend(make_batch([length], [4]), cut_state))
        start += length
    assert float((torch.cat(parts) - whole).abs().max()) < 1e-5
    assert float((cut_state.recurrent - whole_state.recurrent).abs().max()) < 1e-5

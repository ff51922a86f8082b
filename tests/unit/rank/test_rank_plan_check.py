"""Which plans a rank refuses, from their content alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.errors import InvalidPlanError
from tpmodel_worker.rank.plan_check import PlanLimits, check_plan
from tpmodel_worker.rank.slots import Phase, SlotLimits, SlotTable

LIMITS = PlanLimits(
    SlotLimits(max_slots=4, block_size=4, max_blocks=8, num_blocks=16), vocab_size=100, max_step_tokens=24
)


def sampling(**changes: Any) -> pb.SlotSampling:
    return pb.SlotSampling(**({"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": -1} | changes))


def admission(slot: int, length: int = 6, **changes: Any) -> pb.Admission:
    fields: dict[str, Any] = {"token_ids": range(length), "prompt_length": length, "sampling": sampling()}
    return pb.Admission(slot=slot, **(fields | changes))


def delta(slot: int, *blocks: int, start: int = 0) -> pb.BlockTableDelta:
    return pb.BlockTableDelta(slot=slot, start=start, blocks=blocks)


def chunk(slot: int, length: int) -> pb.PrefillChunk:
    return pb.PrefillChunk(slot=slot, length=length)


def save(slot: int, snapshot: int) -> pb.StateSave:
    return pb.StateSave(slot=slot, snapshot=snapshot)


def plan(**parts: Any) -> pb.GenerateStepRequest:
    return pb.GenerateStepRequest(**parts)


@pytest.fixture
def table() -> SlotTable:
    """Slot 0 decodes after 6 of at most 13 computed tokens, with 2 blocks; slot 1 has 4 of 10 tokens to prefill."""
    table = SlotTable(LIMITS.slots, torch.device("cpu"))
    table.admit([admission(0), admission(1, length=10, computed_length=6)])
    table.extend([delta(0, 0, 1), delta(1, 2, 3)])
    table.host.phase[0] = Phase.DECODE
    table.host.computed[0] = 6
    return table


GOOD = {
    "settle": plan(ack_now=True),
    "decode": plan(decode_slots=[0], steps=2),
    "decode with another block": plan(block_table_deltas=[delta(0, 9, start=2)], decode_slots=[0], steps=6),
    "prefill beside decode": plan(decode_slots=[0], prefill_chunks=[chunk(1, 2)], steps=1),
    "release and admit again": plan(
        releases=[0],
        admissions=[admission(0)],
        block_table_deltas=[delta(0, 0, 1)],
        prefill_chunks=[chunk(0, 6)],
        steps=1,
    ),
    "all tokens prefix hits but the last": plan(admissions=[admission(2, computed_length=5)]),
    "block copy": plan(block_copies=[pb.BlockCopy(source=0, target=15)]),
    "decode at the end of max_tokens": plan(block_table_deltas=[delta(0, 9, 10, start=2)], decode_slots=[0], steps=8),
}

BAD = {
    "slot 4 is out of range": plan(releases=[4]),
    "slot 2 is released but holds no sequence": plan(releases=[2]),
    "slot 0 is released but": plan(releases=[0, 0]),
    "slot 9 is out of range": plan(admissions=[admission(9)]),
    "slot 1 is admitted to but holds a sequence": plan(admissions=[admission(1)]),
    "slot 2 is admitted to but": plan(admissions=[admission(2), admission(2)]),
    "prompt_length 7 is not in 1 to 6": plan(admissions=[admission(2, prompt_length=7)]),
    "prompt_length 0 is not in 1 to 6": plan(admissions=[admission(2, prompt_length=0)]),
    "prompt_length 0 is not in 1 to 0": plan(admissions=[admission(2, length=0)]),
    "computed_length 6 leaves none of 6": plan(admissions=[admission(2, computed_length=6)]),
    "2 outputs are known, max_tokens is 2": plan(
        admissions=[admission(2, prompt_length=4, sampling=sampling(max_tokens=2))]
    ),
    "33 tokens exceed the longest sequence": plan(admissions=[admission(2, length=33)]),
    "token id 100 is out of range": plan(admissions=[admission(2, token_ids=[1, 100, 2], prompt_length=3)]),
    "slot 2: temperature": plan(admissions=[admission(2, sampling=sampling(temperature=-1.0))]),
    "slot 3 gets blocks but holds no sequence": plan(block_table_deltas=[delta(3, 0)]),
    "slot 0 gets blocks but": plan(releases=[0], block_table_deltas=[delta(0, 0)]),
    "slot 0: blocks from index 3 on leave a hole after 2": plan(block_table_deltas=[delta(0, 5, start=3)]),
    "slot 0: 9 blocks exceed": plan(block_table_deltas=[delta(0, *range(7), start=2)]),
    "block 16 is out of range": plan(block_table_deltas=[delta(0, 16, start=2)]),
    "block 17 is out of range": plan(block_copies=[pb.BlockCopy(source=17, target=1)]),
    "block 18 is out of range": plan(block_copies=[pb.BlockCopy(source=1, target=18)]),
    "block 1 is copied onto itself": plan(block_copies=[pb.BlockCopy(source=1, target=1)]),
    "9 steps in one plan": plan(decode_slots=[0], steps=9),
    "prefill chunks in a plan of 2 steps": plan(prefill_chunks=[chunk(1, 1)], steps=2),
    "a plan of 0 steps with 1 slots": plan(decode_slots=[0]),
    "a plan of 1 steps with 0 slots": plan(steps=1),
    "25 tokens in one step": plan(
        admissions=[admission(2, length=25)],
        prefill_chunks=[chunk(2, 25)],
        block_table_deltas=[delta(2, *range(7))],
        steps=1,
    ),
    "decode_slots are not ascending": plan(decode_slots=[1, 0], steps=1),
    "decode_slots are not": plan(decode_slots=[0, 0], steps=1),
    "slot 5 is out of range": plan(decode_slots=[0, 5], steps=1),
    "slot 1 cannot decode: it has not sampled yet": plan(decode_slots=[0, 1], steps=1),
    "slot 3 cannot decode": plan(decode_slots=[3], steps=1),
    "slot 0 cannot decode": plan(releases=[0], decode_slots=[0], steps=1),
    "slot 0 has no block for 9 tokens: it holds 2": plan(decode_slots=[0], steps=3),
    "slot 1 has two prefill chunks": plan(prefill_chunks=[chunk(1, 1), chunk(1, 1)], steps=1),
    "slot 0 has no known tokens left": plan(prefill_chunks=[chunk(0, 1)], steps=1),
    "slot 2 has no known tokens left": plan(prefill_chunks=[chunk(2, 1)], steps=1),
    "slot 1: a chunk of 5 after 6 computed tokens does not fit 10": plan(prefill_chunks=[chunk(1, 5)], steps=1),
    "slot 1: a chunk of 0": plan(prefill_chunks=[chunk(1, 0)], steps=1),
    "slot 1 has no block for 9 tokens: it holds 2": plan(prefill_chunks=[chunk(1, 3)], steps=1),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_plan_that_can_be_is_accepted(table: SlotTable, name: str) -> None:
    check_plan(GOOD[name], table.host, LIMITS)


@pytest.mark.parametrize("message", BAD)
def test_a_plan_that_cannot_be_is_refused_with_its_reason_and_touches_nothing(table: SlotTable, message: str) -> None:
    before = copy.deepcopy(vars(table.host))
    with pytest.raises(InvalidPlanError) as refusal:
        check_plan(BAD[message], table.host, LIMITS)
    assert message in str(refusal.value)
    assert refusal.value.kind == pb.ERROR_KIND_INVALID_PLAN
    for name, value in before.items():
        np.testing.assert_equal(getattr(table.host, name), value, err_msg=name)


def test_a_model_with_recurrent_state_computes_a_sequence_from_its_first_token() -> None:
    limits = dataclasses.replace(LIMITS, keeps_state=True)
    table = SlotTable(LIMITS.slots, torch.device("cpu"))
    parts = {"block_table_deltas": [delta(2, 4, 5)], "prefill_chunks": [chunk(2, 2)], "steps": 1}
    check_plan(plan(admissions=[admission(2)], **parts), table.host, limits)
    shared = plan(admissions=[admission(2, computed_length=4)], **parts)
    check_plan(shared, table.host, LIMITS)
    with pytest.raises(InvalidPlanError, match="slot 2: computed_length 4, but the model's recurrent state begins"):
        check_plan(shared, table.host, limits)
    # Unless the state came with the blocks from another gang.
    shared.admissions[0].state_received = True
    check_plan(shared, table.host, limits)


def test_snapshots_of_recurrent_state_are_used_only_behind_the_tokens_that_they_were_made_of() -> None:
    """P10: refused by all ranks alike, from plans alone."""
    slots = dataclasses.replace(LIMITS.slots, snapshots=2)
    limits = dataclasses.replace(LIMITS, slots=slots, keeps_state=True)
    table = SlotTable(slots, torch.device("cpu"))
    table.admit([admission(1, length=10)])
    table.extend([delta(1, 2, 3, 4)])
    check_plan(plan(prefill_chunks=[chunk(1, 8)], steps=1, state_saves=[save(1, 1)]), table.host, limits)
    table.host.computed[1] = 8
    table.note_saves([save(1, 1)])

    def begin(snapshot: int, computed_length: int = 8, **changes: Any) -> pb.GenerateStepRequest:
        admitted = admission(2, computed_length=computed_length, state_snapshot=snapshot, **({"length": 9} | changes))
        return plan(admissions=[admitted])

    check_plan(begin(1), table.host, limits)
    refused = {
        "snapshot 2 is out of range: there are 2": begin(2),
        "snapshot 0 was not made behind the sequence's first 8 tokens": begin(0),
        "snapshot 1 was not made behind the sequence's first 7 tokens": begin(1, computed_length=7),
        "slot 2: snapshot 1 was not made behind": begin(1, token_ids=[*range(7), 99, 8], prompt_length=9),
        "its state was received, and is to be restored": begin(1, state_received=True),
        "slot 2 has no prefill chunk, and its state is to be copied": plan(
            prefill_chunks=[chunk(1, 2)], steps=1, state_saves=[save(2, 0)]
        ),
        "snapshot 5 is out of range": plan(prefill_chunks=[chunk(1, 2)], steps=1, state_saves=[save(1, 5)]),
        "snapshot 0 is made twice": plan(prefill_chunks=[chunk(1, 2)], steps=1, state_saves=[save(1, 0), save(1, 0)]),
    }
    for message, bad in refused.items():
        with pytest.raises(InvalidPlanError) as refusal:
            check_plan(bad, table.host, limits)
        assert message in str(refusal.value)


def test_models_without_recurrent_state_have_no_snapshots_of_it(table: SlotTable) -> None:
    bad = plan(admissions=[admission(2, computed_length=4, state_snapshot=0)])
    with pytest.raises(InvalidPlanError, match="snapshot 0 is out of range: there are 0"):
        check_plan(bad, table.host, LIMITS)

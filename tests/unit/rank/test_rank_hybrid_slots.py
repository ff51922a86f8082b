"""Slots of a model with recurrent state: what one sequence leaves behind must not reach the next one."""

from __future__ import annotations

import pytest

from support.checkpoints import random_prompts
from support.hybrid_rank import HybridRank
from support.oracle import Reference, TieLedger
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.kv_cache import KvCache

PROMPTS = random_prompts(4, shortest=20, longest=90, vocabulary=512, seed=7)


def test_a_slot_that_is_filled_again_knows_nothing_of_its_last_sequence(hybrid_checkpoint, arenas) -> None:
    """After a release, and in the plan of the release; also after a sequence that ended amid its prompt."""
    rank, reference, ledger = HybridRank(hybrid_checkpoint, arenas), Reference(hybrid_checkpoint), TieLedger()
    for prompt in PROMPTS:
        served = rank.generate(1, prompt, 12, chunk=33)
        reference.check_greedy(prompt, served, ledger, what=f"prompt of {len(prompt)}")
        rank.execute(releases=[1])
    sampling = pb.SlotSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=9, logprobs=-1)
    rank.execute(
        admissions=[pb.Admission(slot=1, token_ids=PROMPTS[0], prompt_length=len(PROMPTS[0]), sampling=sampling)],
        block_table_deltas=[pb.BlockTableDelta(slot=1, start=0, blocks=range(16, 32))],
        prefill_chunks=[pb.PrefillChunk(slot=1, length=5)],
        steps=1,
    )
    rank.execute(releases=[1])
    served = rank.generate(1, PROMPTS[1], 12)
    reference.check_greedy(PROMPTS[1], served, ledger, what="after half a prompt")


def test_the_test_above_sees_a_slot_that_is_not_reset(hybrid_checkpoint, arenas, monkeypatch) -> None:
    monkeypatch.setattr(KvCache, "reset_states", lambda _self, _slots: None)
    rank, reference = HybridRank(hybrid_checkpoint, arenas), Reference(hybrid_checkpoint)
    rank.generate(1, PROMPTS[0], 12)
    rank.execute(releases=[1])
    served = rank.generate(1, PROMPTS[1], 12)
    with pytest.raises(AssertionError, match="transformers chooses"):
        reference.check_greedy(PROMPTS[1], served, TieLedger(), what="leak")


def test_a_slot_that_has_finished_disturbs_no_other(hybrid_checkpoint, arenas) -> None:
    """It idles in the same steps, with a state of its own."""
    rank, reference, ledger = HybridRank(hybrid_checkpoint, arenas), Reference(hybrid_checkpoint), TieLedger()
    rank.generate(0, PROMPTS[0], 3)
    rank.generate(2, PROMPTS[2], 1)
    for _ in range(10):
        rank.execute(decode_slots=[0, 2], steps=1)
    for slot, count in ((0, 4), (2, 2)):
        assert len(rank.sampled[slot]) == count, "max_tokens ends it"
    served = rank.generate(1, PROMPTS[1], 2)
    rank.execute(decode_slots=[0, 2], steps=1)
    reference.check_greedy(PROMPTS[1], served, ledger, what="beside finished slots")

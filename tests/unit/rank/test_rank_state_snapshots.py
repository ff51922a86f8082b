"""Sequences that begin with a snapshot of another one's recurrent state."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from support.checkpoints import random_prompts
from support.hybrid_rank import SLOTS, HybridRank
from support.oracle import Reference, TieLedger
from tpmodel_worker.rank.errors import InvalidPlanError
from tpmodel_worker.rank.kv_cache import KvCache

PROMPTS = random_prompts(4, shortest=20, longest=90, vocabulary=512, seed=7)


def shared_prefix() -> tuple[list[int], list[int]]:
    """Two prompts with their first 40 tokens in common."""
    common = (PROMPTS[0] + PROMPTS[1])[:40]
    return common + PROMPTS[2][:21], common + PROMPTS[3][:19]


def test_a_sequence_goes_on_from_a_snapshot_of_another_ones_state(hybrid_checkpoint, arenas) -> None:
    """In its blocks, in another slot, after the first one's slot was left and filled with something else."""
    rank, reference, ledger = HybridRank(hybrid_checkpoint, arenas), Reference(hybrid_checkpoint), TieLedger()
    first, second = shared_prefix()
    served = rank.generate(0, first, 12, chunk=40, save=1)
    reference.check_greedy(first, served, ledger, what="before")
    rank.execute(releases=[0])
    # Others use the first one's slot, but not its first five blocks.
    rank.generate(0, PROMPTS[1], 3, blocks=range(5, 21), save=0)
    served = rank.generate(1, second, 12, computed=40, restore=1, blocks=[*range(5), *range(30, 41)])
    reference.check_greedy(second, served, ledger, what="behind the snapshot")


def save_nothing(_cache: KvCache, _slots: Sequence[int], _snapshots: Sequence[int]) -> None:
    """The snapshot keeps what was there before."""


def save_the_next_slot(cache: KvCache, slots: Sequence[int], snapshots: Sequence[int]) -> None:
    SAVE(cache, [(slot + 1) % SLOTS for slot in slots], snapshots)


def restore_nothing(_cache: KvCache, _snapshots: Sequence[int], _slots: Sequence[int]) -> None:
    """The slot keeps what was there before."""


def restore_into_the_next_slot(cache: KvCache, snapshots: Sequence[int], slots: Sequence[int]) -> None:
    RESTORE(cache, snapshots, [(slot + 1) % SLOTS for slot in slots])


def restore_the_other_snapshot(cache: KvCache, snapshots: Sequence[int], slots: Sequence[int]) -> None:
    RESTORE(cache, [1 - snapshot for snapshot in snapshots], slots)


SAVE, RESTORE = KvCache.save_states, KvCache.restore_states


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("save_states", save_nothing),
        ("save_states", save_the_next_slot),
        ("restore_states", restore_nothing),
        ("restore_states", restore_into_the_next_slot),
        ("restore_states", restore_the_other_snapshot),
    ],
)
def test_the_test_above_sees_a_state_that_comes_from_elsewhere(
    hybrid_checkpoint, arenas, monkeypatch, method, wrong
) -> None:
    monkeypatch.setattr(KvCache, method, wrong)
    rank, reference = HybridRank(hybrid_checkpoint, arenas), Reference(hybrid_checkpoint)
    first, second = shared_prefix()
    rank.generate(0, first, 2, chunk=40, save=1)
    rank.generate(2, PROMPTS[1], 2, save=0)
    served = rank.generate(1, second, 12, computed=40, restore=1, blocks=[*range(5), *range(50, 60)])
    with pytest.raises(AssertionError, match="transformers chooses"):
        reference.check_greedy(second, served, TieLedger(), what="from elsewhere")


def test_a_snapshot_that_was_written_over_is_refused_behind_its_old_tokens(hybrid_checkpoint, arenas) -> None:
    """P10: before anything is touched, so the slot can still be filled."""
    rank, reference = HybridRank(hybrid_checkpoint, arenas), Reference(hybrid_checkpoint)
    first, second = shared_prefix()
    rank.generate(0, first, 2, chunk=40, save=1)
    rank.generate(2, PROMPTS[1], 2, save=1)
    blocks = [*range(5), *range(50, 60)]
    with pytest.raises(InvalidPlanError, match="snapshot 1 was not made behind the sequence's first 40 tokens"):
        rank.generate(1, second, 12, computed=40, restore=1, blocks=blocks)
    served = rank.generate(1, second, 12, blocks=range(20, 32))
    reference.check_greedy(second, served, TieLedger(), what="from its first token")

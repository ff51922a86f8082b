"""How failures of engine and ranks read together."""

from __future__ import annotations

import pytest

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import (
    ChecksumError,
    PoolError,
    RankFailure,
    StepDeadlineError,
    closed_before_reply,
)

BROKEN = RankFailure(2, "disk is gone", worker_pb2.ERROR_KIND_BAD_CHECKPOINT)
POISONED = RankFailure(1, "illegal memory access", worker_pb2.ERROR_KIND_DEVICE_POISONED)
EXITED = RankFailure(0, "killed by SIGKILL", closed=True, exited=True)
CRASHED = closed_before_reply(0, "UNAVAILABLE: Socket closed")


@pytest.mark.parametrize(
    ("engine", "ranks", "text"),
    [
        (ValueError("no plan"), [], "load failed: engine: no plan"),
        (None, [BROKEN], "load failed: rank 2: bad_checkpoint: disk is gone"),
        (
            ValueError("no plan"),
            [BROKEN, CRASHED],
            (
                "load failed: engine: no plan; rank 0: session closed before reply (UNAVAILABLE: Socket closed); "
                "rank 2: bad_checkpoint: disk is gone"
            ),
        ),
        (None, [CRASHED], "load failed: rank 0: session closed before reply (UNAVAILABLE: Socket closed)"),
    ],
    ids=["engine only", "ranks only", "both", "crash"],
)
def test_every_half_is_reported_engine_first_then_ranks_in_order(
    engine: Exception | None, ranks: list[RankFailure], text: str
) -> None:
    """P12."""
    assert str(PoolError("load failed", engine=engine, ranks=ranks)) == text


def test_later_accounts_are_attached_and_the_first_of_each_rank_stays() -> None:
    """W24."""
    first = PoolError("plan 3 failed", ranks=[RankFailure(1, "first")])
    whole = first.with_ranks([RankFailure(1, "again"), RankFailure(0, "too")])
    assert str(whole) == "plan 3 failed: rank 0: too; rank 1: first"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PoolError("x", engine=ChecksumError("differ")), "checksum"),
        (PoolError("x", engine=StepDeadlineError("late"), ranks=[BROKEN]), "step_deadline"),
        (PoolError("x", ranks=[BROKEN]), "bad_checkpoint"),
        (PoolError("x", ranks=[BROKEN, CRASHED]), "session_closed"),
        (PoolError("x", ranks=[CRASHED, EXITED]), "rank_exited"),
        (PoolError("x", ranks=[EXITED, POISONED]), "device_poisoned"),
        (PoolError("x"), "internal"),
    ],
)
def test_fault_has_one_word_for_metrics(error: PoolError, kind: str) -> None:
    assert error.fault_kind == kind


def test_what_became_of_a_process_says_more_than_a_broken_session_and_less_than_the_rank_itself() -> None:
    """P12."""
    error = PoolError("a session has ended", ranks=[CRASHED]).with_exit(EXITED)
    assert str(error) == "a session has ended: rank 0: killed by SIGKILL"
    spoke = PoolError("plan 3 failed", ranks=[POISONED])
    assert spoke.with_exit(RankFailure(1, "killed by SIGKILL", closed=True, exited=True)) is spoke

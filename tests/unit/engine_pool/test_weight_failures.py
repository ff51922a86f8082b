"""Weight updates that fail at each of their stages, on one rank of two: in place, and in shadow.

In place nothing is served until a full set has come; in shadow nothing has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from support.update_ranks import World, open_world
from support.updated_engine import Gate, UpdatedEngine
from tpmodel.v1 import weights_pb2
from tpmodel_worker.engine.weight_errors import UpdateError


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path) as world:
        yield world


@pytest.fixture
async def engine(world: World, tmp_path: Path) -> AsyncIterator[UpdatedEngine]:
    engine = UpdatedEngine(world, tmp_path)
    yield engine
    await engine.close()


def fail() -> None:
    raise OSError(28, "No space left on device")


async def heal(engine: UpdatedEngine, version: int) -> None:
    """A full set in place mends whatever there is."""
    engine.rank_pool.before.clear()
    await engine.update(version, shadow=False, weights=engine.world.new_weights(version))
    assert engine.updates.served.version == version
    assert [rank.version for rank in engine.ranks] == [version] * len(engine.ranks)


def check_ended(engine: UpdatedEngine, *, shadow: bool, touched: bool = True) -> None:
    served = engine.updates.served
    if shadow or not touched:
        assert (served.HasField("version"), served.version, served.reason) == (True, 0, "")
        assert engine.unchanged()
    else:
        assert (served.HasField("version"), served.reason) == (False, "WeightsIncomplete")
        assert engine.status.weights_condition == "WeightsIncomplete"


async def test_an_engine_that_has_not_loaded_names_no_version(world: World, tmp_path: Path) -> None:
    """E46: what a new engine's ranks have may be any version, or none."""
    engine = UpdatedEngine(world, tmp_path, loaded=False)
    served = engine.updates.served
    assert (served.HasField("version"), served.reason) == (False, "Loading")
    engine.status.set_loaded_versions([3, 3])
    served = engine.updates.served
    assert (served.version, served.reason) == (3, "")
    await engine.close()


STEPS = ("join", "begin", "receive", "prepare", "commit")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_an_exception_on_one_rank_leaves_no_half_set(engine: UpdatedEngine, step: str, shadow: bool) -> None:
    """E46, U35."""
    engine.rank_pool.before[step, 1] = fail
    weights = engine.world.new_weights(5)
    with pytest.raises(UpdateError, match=r"rank 1: internal: .*No space left on device"):
        await engine.update(1, shadow=shadow, weights=weights)
    await engine.abort("as the trainer's side does after every failure")
    # In place the set is broken off once bytes may have moved.
    check_ended(engine, shadow=shadow, touched=step in ("receive", "prepare", "commit"))
    await heal(engine, 2)


async def test_the_ranks_check_for_themselves_what_a_trainer_announces(engine: UpdatedEngine) -> None:
    """E36, E41: nothing moves, and the next call may be right."""
    await engine.init(shadow=False)
    await engine.start()
    with pytest.raises(UpdateError, match=r"1 names, 0 dtypes and 0 shapes") as caught:
        await anext(engine.updates.update(weights_pb2.UpdateRequest(names=["a"], session=engine.session)))
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert engine.unchanged()
    await engine.send(engine.world.new_weights(5))
    await engine.finish(1)
    assert engine.updates.served.version == 1


@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_a_prepare_that_fails_once_may_be_tried_again(engine: UpdatedEngine, shadow: bool) -> None:
    """E46: nothing is committed anywhere before every rank is prepared."""
    await engine.up_to_finish(shadow=shadow, weights=engine.world.new_weights(5))
    engine.rank_pool.before["prepare", 0] = fail
    with pytest.raises(UpdateError):
        await engine.finish(1)
    assert [rank.version for rank in engine.ranks] == ([0, 0] if shadow else [None, None])
    engine.rank_pool.before.clear()
    await engine.finish(1)
    assert engine.updates.served.version == 1


@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_a_rank_that_cannot_confirm_does_not_undo_what_all_have_committed(
    engine: UpdatedEngine, shadow: bool
) -> None:
    """E46: the version is decided; the world ends, and the next one takes it up."""
    await engine.up_to_finish(shadow=shadow, weights=engine.world.new_weights(5))
    engine.rank_pool.before["confirm", 1] = fail
    await engine.finish(1)
    served = engine.updates.served
    assert (served.version, served.newest_version, served.reason) == (1, 1, "")
    assert engine.rank_pool.error is not None
    assert "version 1 was committed, but could not be taken up" in str(engine.rank_pool.error)
    await engine.abort("as a trainer does that leaves")
    assert [rank.version for rank in engine.ranks] == [1, 1]
    assert engine.committed.read() == 1
    engine.build_again()
    assert engine.sets() == [{0: 1}] * 2
    assert [rank.version for rank in engine.ranks] == [1, 1]
    await heal(engine, 2)


async def test_a_commit_that_cannot_be_taken_back_ends_the_world_and_the_next_one_has_the_old_version(
    engine: UpdatedEngine,
) -> None:
    """E46, U35: in shadow; a rank fails to commit, and another one to go back."""
    engine.rank_pool.before["commit", 1] = fail
    engine.rank_pool.before["abort", 0] = fail
    with pytest.raises(UpdateError, match=r"version 1 was not committed: .*rank 1: .*No space left on device"):
        await engine.update(1, shadow=True, weights=engine.world.new_weights(5))
    assert engine.rank_pool.error is not None
    assert [rank.version for rank in engine.ranks] == [1, 0]
    served = engine.updates.served
    assert (served.version, served.newest_version, served.reason) == (0, 0, "")
    engine.build_again()
    check_ended(engine, shadow=True)
    assert engine.sets() == [{0: 0}] * 2
    await heal(engine, 2)


@pytest.mark.parametrize("step", ["prepare", "commit"])
@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_a_trainer_that_dies_during_finish_does_not_stop_it(
    engine: UpdatedEngine, shadow: bool, step: str
) -> None:
    """E46: it has done its part; the set is committed on every rank."""
    gate = Gate()
    engine.rank_pool.before[step, 1] = gate
    await engine.up_to_finish(shadow=shadow, weights=engine.world.new_weights(5))
    with gate.closed():
        finishing = asyncio.ensure_future(engine.finish(1))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        engine.lose_the_trainer()
        finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    assert engine.updates.served.version == 1
    assert [rank.version for rank in engine.ranks] == [1, 1]
    assert engine.rank_pool.cleared == 1


@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_a_start_that_is_cancelled_leaves_nothing_paused(engine: UpdatedEngine, shadow: bool) -> None:
    gate = Gate()
    engine.rank_pool.before["begin", 1] = gate
    await engine.init(shadow=shadow)
    with gate.closed():
        starting = asyncio.ensure_future(engine.start())
        assert await asyncio.to_thread(gate.reached.wait, 30)
        starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    check_ended(engine, shadow=shadow, touched=False)
    await heal(engine, 1)


@pytest.mark.parametrize("stage", ["started", "sent"])
@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_a_trainer_that_dies_between_two_calls_is_noticed_at_once(
    engine: UpdatedEngine, shadow: bool, stage: str
) -> None:
    """E46."""
    await engine.init(shadow=shadow, deadline_seconds=60)
    await engine.start()
    if stage == "sent":
        await engine.send(engine.world.new_weights(5))
    engine.lose_the_trainer()
    await ended(engine)
    check_ended(engine, shadow=shadow, touched=stage == "sent")
    await heal(engine, 1)


@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_a_trainer_that_dies_within_update_ends_it_though_no_rank_notices(
    engine: UpdatedEngine, shadow: bool
) -> None:
    """E46: as over NCCL, and where another program holds the call. The deadline is a minute."""
    await engine.init(shadow=shadow, deadline_seconds=60)
    await engine.start()
    weights = engine.world.new_weights(5)
    begun = asyncio.get_running_loop().time()
    with pytest.raises(UpdateError, match="the trainer has gone") as caught:
        await engine.receive(weights, then=engine.lose_the_trainer)
    assert caught.value.code == grpc.StatusCode.ABORTED
    assert asyncio.get_running_loop().time() - begun < 20
    check_ended(engine, shadow=shadow)
    await heal(engine, 1)


@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
async def test_a_trainer_that_hangs_within_update_is_waited_for_up_to_the_deadline(
    engine: UpdatedEngine, shadow: bool
) -> None:
    """E46."""
    await engine.init(shadow=shadow, deadline_seconds=1)
    await engine.start()
    with pytest.raises(UpdateError):
        await engine.receive(engine.world.new_weights(5))
    check_ended(engine, shadow=shadow)
    await heal(engine, 1)


async def test_the_time_of_an_update_is_told_by_its_parts(engine: UpdatedEngine) -> None:
    await engine.up_to_finish(shadow=False, weights=engine.world.new_weights(5))
    phases = await engine.finish(1)
    assert [phase.name for phase in phases] == [
        "pause", "begin", "trainer", "check", "prepare_receiving", "receive", "digest", "commit", "confirm", "clear",
    ]  # fmt: skip
    assert all(phase.seconds >= 0 for phase in phases)


class TestSessions:
    """One trainer at a time: calls of one that another has taken the gang over from change nothing."""

    async def test_calls_of_a_displaced_trainer_are_refused_and_say_why(self, engine: UpdatedEngine) -> None:
        """E45: at every step of the other one's update, which goes on."""
        await engine.init(shadow=False)
        stale = engine.session
        await engine.init(shadow=False)
        assert engine.session != stale
        await self.check_refused(engine, stale)
        await engine.start()
        await self.check_refused(engine, stale)
        await engine.send(engine.world.new_weights(5))
        await self.check_refused(engine, stale)
        await engine.finish(1)
        await self.check_refused(engine, stale)
        assert engine.updates.served.version == 1
        assert [rank.version for rank in engine.ranks] == [1, 1]

    async def check_refused(self, engine: UpdatedEngine, session: str) -> None:
        updates = engine.updates
        for call in (
            updates.start(weights_pb2.RUNNING_REQUESTS_KEEP, session),
            anext(updates.update(weights_pb2.UpdateRequest(session=session))),
            updates.await_update(weights_pb2.AwaitUpdateRequest(session=session)),
            updates.finish(9, session),
            updates.abort("it goes", session),
        ):
            with pytest.raises(UpdateError, match="another trainer has taken this gang over: join again") as caught:
                await call
            assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION

    async def test_a_displaced_trainer_does_not_wait_for_the_other_ones_call(self, engine: UpdatedEngine) -> None:
        await engine.init(shadow=False)
        stale = engine.session
        await engine.init(shadow=False)
        gate = Gate()
        engine.rank_pool.before["begin", 1] = gate
        with gate.closed():
            starting = asyncio.ensure_future(engine.start())
            assert await asyncio.to_thread(gate.reached.wait, 30)
            with pytest.raises(UpdateError, match="another trainer has taken this gang over"):
                await engine.updates.abort("it goes", stale)
        await starting

    async def test_a_call_without_a_session_is_refused_with_what_to_do(self, engine: UpdatedEngine) -> None:
        await engine.init(shadow=False)
        with pytest.raises(UpdateError, match="session is empty: InitUpdate answers with the one") as caught:
            await engine.updates.start(weights_pb2.RUNNING_REQUESTS_KEEP, "")
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
        await engine.start()

    async def test_a_trainer_that_could_not_join_has_no_hold_on_the_gang(self, engine: UpdatedEngine) -> None:
        """Another one joins as if it had not been."""
        engine.rank_pool.before["join", 1] = fail
        with pytest.raises(UpdateError):
            await engine.init(shadow=False)
        await heal(engine, 1)


async def ended(engine: UpdatedEngine) -> None:
    """Returns when the update is over."""
    async with asyncio.timeout(20):
        while True:
            try:
                await engine.start()
            except UpdateError as error:
                if "the update is idle" in str(error):
                    return
            await asyncio.sleep(0.02)

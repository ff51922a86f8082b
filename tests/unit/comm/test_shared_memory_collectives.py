"""Shared-memory collectives: values, argument checks, abort, deadline, epochs. Ranks are threads here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.collective_inputs import expected_sum, rank_input
from support.thread_world import ThreadWorld
from tpmodel_worker.comm.communicator import (
    CollectiveArgumentError,
    Communicator,
    CommunicatorAbortedError,
    CommunicatorError,
)

SUMMED = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]
BIG_SLOT = 256 * 1024


def reduced(count: int, dtype: torch.dtype):
    def part(communicator: Communicator) -> torch.Tensor:
        return communicator.all_reduce(rank_input(communicator.rank, count, dtype))

    return part


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sums_are_those_in_rank_order_on_every_rank(world_size: int, dtype: torch.dtype) -> None:
    with ThreadWorld(world_size, slot_bytes=BIG_SLOT) as world:
        # One shot, two shots with uneven shares, and several pieces.
        for count in (1, 17, 1024, 65_537, 200_003):
            expected = expected_sum(world_size, count, dtype)
            for result in world.run(reduced(count, dtype)):
                assert torch.equal(result, expected), count


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    dtype=st.sampled_from(SUMMED),
    world_size=st.integers(2, 4),
)
def test_any_series_of_sizes_gives_the_sums(counts: list[int], dtype: torch.dtype, world_size: int) -> None:
    def part(communicator: Communicator) -> list[torch.Tensor]:
        return [communicator.all_reduce(rank_input(communicator.rank, count, dtype)) for count in counts]

    with ThreadWorld(world_size) as world:
        expected = [expected_sum(world_size, count, dtype) for count in counts]
        for results in world.run(part):
            assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_keep_infinities_and_nans_and_round_ties_to_even(dtype: torch.dtype) -> None:
    # 1 + 2^-9 lies between two numbers of bfloat16, 1 + 2^-11 between two of float16.
    tie = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    ours = torch.tensor([float("inf"), float("nan"), 1.0, torch.finfo(dtype).max, -0.0], dtype=dtype)
    theirs = torch.tensor([1.0, 1.0, tie, torch.finfo(dtype).max, -0.0], dtype=dtype)

    def part(communicator: Communicator) -> torch.Tensor:
        return communicator.all_reduce((ours if communicator.rank == 0 else theirs).clone())

    with ThreadWorld(2) as world:
        expected = (ours.float() + theirs.float()).to(dtype)
        for result in world.run(part):
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.signbit(result[4])


@settings(max_examples=30, deadline=None)
@given(
    series=st.lists(
        st.tuples(st.sampled_from(["all_reduce", "all_gather", "broadcast"]), st.integers(1, 9000)), max_size=12
    )
)
def test_any_mixture_of_collectives_reuses_slots_safely(series: list[tuple[str, int]]) -> None:
    world_size = 3

    def part(communicator: Communicator) -> None:
        for number, (operation, count) in enumerate(series):
            tensor = rank_input(communicator.rank, count, torch.float32)
            if operation == "all_reduce":
                assert torch.equal(communicator.all_reduce(tensor), expected_sum(world_size, count, torch.float32))
            elif operation == "all_gather":
                parts = [rank_input(rank, count, torch.float32) for rank in range(world_size)]
                assert torch.equal(communicator.all_gather(tensor), torch.stack(parts))
            else:
                root = number % world_size
                assert torch.equal(communicator.broadcast(tensor, root), rank_input(root, count, torch.float32))

    with ThreadWorld(world_size) as world:
        world.run(part)


def test_all_gather_keeps_shape_and_dtype_and_fills_outputs() -> None:
    def part(communicator: Communicator) -> tuple[torch.Tensor, list[torch.Tensor]]:
        outputs = [torch.zeros(2, 3, dtype=torch.bool) for _ in range(2)]
        gathered = communicator.all_gather(torch.full((2, 3), communicator.rank == 1), outputs)
        return gathered, outputs

    with ThreadWorld(2) as world:
        for gathered, outputs in world.run(part):
            assert gathered.shape == (2, 2, 3)
            assert not gathered[0].any()
            assert gathered[1].all()
            assert torch.equal(torch.stack(outputs), gathered)


class TestArguments:
    """W23: nothing is sent, so the world can go on."""

    def test_count_mismatch_names_both_counts(self) -> None:
        with ThreadWorld(2) as world, pytest.raises(CollectiveArgumentError, match="expected 2 tensors, got 3"):
            world.communicators[0].all_gather(torch.ones(1), [torch.ones(1)] * 3)

    def test_wrong_device_names_index_actual_and_expected(self) -> None:
        outputs = [torch.ones(1), torch.ones(1, device="meta")]
        with ThreadWorld(2) as world, pytest.raises(CollectiveArgumentError, match="tensor 1 is on meta, expected cpu"):
            world.communicators[0].all_gather(torch.ones(1), outputs)

    @pytest.mark.parametrize("root", [-1, 2])
    def test_bad_root_is_refused(self, root: int) -> None:
        with ThreadWorld(2) as world, pytest.raises(CollectiveArgumentError, match=f"root {root} .*expected 0 to 1"):
            world.communicators[0].broadcast(torch.ones(1), root)

    def test_dtype_without_a_sum_is_refused(self) -> None:
        with ThreadWorld(2) as world, pytest.raises(CollectiveArgumentError, match=r"can't sum torch\.uint8"):
            world.communicators[0].all_reduce(torch.ones(1, dtype=torch.uint8))

    def test_world_goes_on_after_a_refusal(self) -> None:
        with ThreadWorld(2) as world:
            with pytest.raises(CollectiveArgumentError):
                world.communicators[0].all_reduce(torch.ones(2, 2).t()[:1])
            assert [result.item() for result in world.run(reduced(1, torch.float32))] == [
                expected_sum(2, 1, torch.float32).item()
            ] * 2


class TestFailures:
    def test_abort_from_another_thread_releases_a_waiting_rank(self) -> None:
        """P17: the rank was alone in the collective, for longer than its spins last."""
        with ThreadWorld(2) as world, ThreadPoolExecutor(1) as pool:
            waiting = world.start(pool, 0, reduced(8, torch.float32))
            time.sleep(0.2)
            assert not waiting.done()
            aborted = time.monotonic()
            world.communicators[0].abort("peer is gone")
            with pytest.raises(
                CommunicatorAbortedError, match="rank 0: all_reduce 1 of epoch 7 was aborted: peer is gone"
            ):
                waiting.result(5)
            assert time.monotonic() - aborted < 1.0

    def test_collectives_after_an_abort_raise_at_once_and_the_first_reason_stays(self) -> None:
        with ThreadWorld(2) as world:
            world.communicators[0].abort("first")
            world.communicators[0].abort("second")
            for call in (reduced(1, torch.float32), lambda communicator: communicator.barrier()):
                with pytest.raises(CommunicatorAbortedError, match="first"):
                    call(world.communicators[0])

    def test_deadline_names_the_rank_that_did_not_come(self) -> None:
        with ThreadWorld(3, deadline_seconds=0.3) as world, ThreadPoolExecutor(2) as pool:
            futures = [world.start(pool, rank, reduced(8, torch.float32)) for rank in (0, 1)]
            for rank, future in enumerate(futures):
                with pytest.raises(CommunicatorError, match=rf"rank {rank}: .* rank 2 did not come within 0\.3 s"):
                    future.result(5)

    def test_failed_communicator_stays_failed(self) -> None:
        with ThreadWorld(2, deadline_seconds=0.1) as world:
            for _ in range(2):
                with pytest.raises(CommunicatorError, match="did not come"):
                    world.communicators[0].barrier()

    def test_peer_in_a_newer_epoch_is_an_error_not_a_wait(self) -> None:
        with ThreadWorld(2) as world, ThreadPoolExecutor(1) as pool:
            waiting = world.start(pool, 0, reduced(8, torch.float32))
            time.sleep(0.05)
            world.reset(1, epoch=8)
            with pytest.raises(CommunicatorError, match="rank 1 has left the epoch"):
                waiting.result(5)

    def test_different_collectives_are_an_error_on_both_sides(self) -> None:
        with ThreadWorld(2) as world, ThreadPoolExecutor(2) as pool:
            sums = world.start(pool, 0, reduced(8, torch.float32))
            gathers = world.start(pool, 1, lambda communicator: communicator.all_gather(torch.ones(8)))
            for future in (sums, gathers):
                with pytest.raises(CommunicatorError, match="called another collective"):
                    future.result(5)

    def test_stale_signals_of_an_older_epoch_are_not_taken_for_new_ones(self) -> None:
        """A rank that has not come yet shows 50 collectives of the epoch before."""
        with ThreadWorld(2, deadline_seconds=0.2) as world:
            world.run(lambda communicator: [communicator.barrier() for _ in range(50)])
            world.begin(8)
            with pytest.raises(CommunicatorError, match="did not come"):
                world.communicators[0].barrier()

    def test_same_arenas_serve_many_epochs(self) -> None:
        with ThreadWorld(2) as world:
            for epoch in range(8, 28):
                world.begin(epoch)
                for count in (3, 3000):
                    expected = expected_sum(2, count, torch.float32)
                    assert all(torch.equal(result, expected) for result in world.run(reduced(count, torch.float32)))

    def test_closed_communicator_refuses_and_abort_and_close_stay_harmless(self) -> None:
        with ThreadWorld(2) as world:
            communicator = world.communicators[0]
            communicator.close()
            communicator.close()
            communicator.abort("too late")
            with pytest.raises(CommunicatorError, match="closed"):
                communicator.barrier()

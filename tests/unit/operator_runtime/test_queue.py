"""The queue: every key once, never with two workers, faults first, failures later and later."""

import asyncio

from tpmodel_operator.kube import ApiError
from tpmodel_operator.queue import Key, Turn, Urgency, WorkQueue, backoff, work

A, B, C = Key("default", "a"), Key("default", "b"), Key("default", "c")


async def turn(queue: WorkQueue) -> Turn:
    got = await asyncio.wait_for(queue.get(), 1)
    assert got is not None
    return got


async def nothing_waits(queue: WorkQueue) -> bool:
    try:
        await asyncio.wait_for(queue.get(), 0.05)
    except TimeoutError:
        return True
    return False


async def test_a_key_that_is_added_twice_gets_one_turn():
    queue = WorkQueue()
    queue.add(A)
    queue.add(A)
    assert queue.depth == 1
    assert (await turn(queue)).key == A
    assert await nothing_waits(queue)


async def test_a_key_that_is_being_worked_on_waits_for_the_end_of_its_pass():
    queue = WorkQueue()
    queue.add(A)
    await turn(queue)
    queue.add(A)
    assert await nothing_waits(queue)
    queue.done(A)
    assert (await turn(queue)).key == A


async def test_faults_overtake_changed_specs_and_these_all_else():
    queue = WorkQueue()
    queue.add(A)
    queue.add(B, Urgency.SPEC)
    queue.add(C, Urgency.FAULT)
    assert [(await turn(queue)).key for _ in range(3)] == [C, B, A]


async def test_keys_of_one_urgency_come_in_their_order():
    queue = WorkQueue()
    for key in (C, A, B):
        queue.add(key, Urgency.SPEC)
    assert [(await turn(queue)).key for _ in range(3)] == [C, A, B]


async def test_a_waiting_key_keeps_its_highest_urgency():
    queue = WorkQueue()
    queue.add(A)
    queue.add(B)
    queue.add(B, Urgency.FAULT)
    queue.add(B)
    assert [(await turn(queue)).key for _ in range(2)] == [B, A]


async def test_a_key_that_is_being_worked_on_keeps_its_urgency_for_the_next_turn():
    queue = WorkQueue()
    queue.add(A)
    await turn(queue)
    queue.add(B)
    queue.add(A, Urgency.FAULT)
    queue.done(A)
    assert [(await turn(queue)).key for _ in range(2)] == [A, B]


async def test_a_turn_knows_its_oldest_event():
    queue = WorkQueue()
    queue.add(A, event=1.0)
    queue.add(A, event=2.0)
    assert (await turn(queue)).event == 1.0
    queue.add(A, event=3.0)
    queue.add(A, event=4.0)
    queue.done(A)
    assert (await turn(queue)).event == 3.0


async def test_a_turn_knows_since_when_it_waited():
    now = 10.0
    queue = WorkQueue(clock=lambda: now)
    queue.add(A)
    now = 12.0
    queue.add(A, event=12.0)
    assert (await turn(queue)).queued == 10.0


async def test_a_scheduled_key_comes_when_it_is_due():
    queue = WorkQueue()
    queue.schedule(A, 0.1)
    assert await nothing_waits(queue)
    assert (await turn(queue)).key == A


async def test_a_later_schedule_takes_the_place_of_the_earlier():
    queue = WorkQueue()
    queue.schedule(A, 0.02)
    queue.schedule(A, 60)
    assert await nothing_waits(queue)


async def test_a_success_without_another_date_cancels_the_schedule():
    queue = WorkQueue()
    queue.schedule(A, 0.02)
    queue.succeeded(A, None)
    assert await nothing_waits(queue)


def test_failures_wait_longer_and_longer_up_to_a_limit():
    waits = [backoff(failures) for failures in range(1, 40)]
    assert waits[:4] == [0.25, 0.5, 1.0, 2.0]
    assert waits == sorted(waits)
    assert waits[-1] == 60.0


async def test_a_success_forgets_failures():
    queue = WorkQueue()
    assert [queue.failed(A), queue.failed(A)] == [0.25, 0.5]
    queue.succeeded(A, None)
    assert queue.failed(A) == 0.25


async def test_a_failing_key_is_tried_again_and_leaves_the_others_alone():
    queue = WorkQueue()
    passes: list[Key] = []

    async def run_pass(turn: Turn) -> None:
        passes.append(turn.key)
        if turn.key == A and passes.count(A) < 3:
            raise ApiError(500, "InternalError", "no")
        if turn.key == B and passes.count(B) < 2:
            raise KeyError("a mistake of ours")
        if passes.count(A) == 3 and passes.count(B) == 2:
            queue.close()

    queue.add(A)
    queue.add(B)
    await asyncio.wait_for(work(queue, run_pass), 5)
    assert sorted(passes, key=str) == [A, A, A, B, B]


async def test_two_workers_never_have_the_same_key():
    queue = WorkQueue()
    running: list[Key] = []
    most = 0

    async def run_pass(turn: Turn) -> None:
        nonlocal most
        assert turn.key not in running
        running.append(turn.key)
        most = max(most, len(running))
        queue.add(turn.key)
        await asyncio.sleep(0.001)
        running.remove(turn.key)

    for key in (A, B, C):
        queue.add(key)
    workers = [asyncio.create_task(work(queue, run_pass)) for _ in range(3)]
    await asyncio.sleep(0.1)
    queue.close()
    await asyncio.gather(*workers)
    assert most == 3


async def test_closing_ends_the_workers_after_their_pass():
    queue = WorkQueue()
    begun, finished = asyncio.Event(), asyncio.Event()

    async def run_pass(turn: Turn) -> None:
        begun.set()
        await asyncio.sleep(0.05)
        finished.set()

    queue.add(A)
    worker = asyncio.create_task(work(queue, run_pass))
    await begun.wait()
    queue.add(B)
    queue.close()
    await asyncio.wait_for(worker, 1)
    assert finished.is_set()
    assert queue.depth == 1

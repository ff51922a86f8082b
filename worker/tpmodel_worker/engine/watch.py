"""The watch over the step deadline: asks ranks that are late why, before it calls them hung."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import grpc

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import RankFailure, StepDeadlineError, WrongRankError
from tpmodel_worker.engine.plans import PlanWindow
from tpmodel_worker.engine.session import RankChannel

logger = logging.getLogger(__name__)

_LONGEST_SLEEP = 1.0
_SHORTEST_PING_SECONDS = 0.2

FaultCallback = Callable[[StepDeadlineError, Sequence[RankFailure]], None]


async def watch_steps(
    window: PlanWindow,
    channels: Sequence[RankChannel],
    *,
    epoch: int,
    sent: asyncio.Event,
    ping_timeout: float,
    on_fault: FaultCallback,
) -> None:
    """Runs until a plan is past its deadline without a busy report, then calls on_fault once.

    sent: set whenever a plan has been sent; cleared here while nothing is under way. on_fault gets the
    ranks that lag and, of those, what is wrong with the ones that did not answer Ping.
    """
    lead = min(ping_timeout, window.least_deadline / 2)
    while True:
        due = window.due()
        if due is None:
            sent.clear()
            await sent.wait()
        elif (left := due - lead - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _LONGEST_SLEEP))
        else:
            answers = await _ask_around(window, channels, due, ping_timeout, epoch)
            due = window.due()
            if due is not None and due <= time.monotonic():
                seq, late = window.overdue()
                names = ", ".join(str(rank) for rank in late)
                error = StepDeadlineError(f"plan {seq} is late: not done by rank {names} past the step deadline")
                on_fault(error, [answer for answer in answers if isinstance(answer, RankFailure)])
                return


async def _ask_around(
    window: PlanWindow, channels: Sequence[RankChannel], due: float, ping_timeout: float, epoch: int
) -> list[worker_pb2.PingResponse | RankFailure]:
    """What every rank answers to Ping around the time `due`.

    Asked ahead, so that a rank that does not answer has had its time for that when the deadline passes. Those that
    did are asked again then: they may have become busy in between.
    """
    ahead = max(due - time.monotonic(), _SHORTEST_PING_SECONDS)
    answers = await asyncio.gather(*(_ask(channel, ahead) for channel in channels))
    _extend(window, answers, epoch)
    await asyncio.sleep(max(due - time.monotonic(), 0.0))
    still = window.due()
    if still is None or still > time.monotonic():
        return answers
    silent = [answer for answer in answers if isinstance(answer, RankFailure)]
    answering = [
        channel for channel, answer in zip(channels, answers, strict=True) if not isinstance(answer, RankFailure)
    ]
    answers = await asyncio.gather(*(_ask(channel, ping_timeout) for channel in answering))
    _extend(window, answers, epoch)
    return [*silent, *answers]


def _extend(window: PlanWindow, answers: Sequence[worker_pb2.PingResponse | RankFailure], epoch: int) -> None:
    reports = [answer.busy for answer in answers if isinstance(answer, worker_pb2.PingResponse)]
    busy = max(reports, key=lambda report: report.until, default=worker_pb2.Busy())
    if (left := busy.until - time.time()) > 0:
        logger.info("a plan is late: a rank is busy", extra={"epoch": epoch, "cause": busy.what})
        window.extend(time.monotonic() + left)


async def _ask(channel: RankChannel, timeout: float) -> worker_pb2.PingResponse | RankFailure:
    try:
        return await channel.ping(timeout)
    except grpc.aio.AioRpcError as error:
        return RankFailure(channel.endpoint.rank, f"does not answer Ping ({error.code().name}: {error.details()})")
    except WrongRankError as error:
        return RankFailure(channel.endpoint.rank, str(error))

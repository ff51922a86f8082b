"""The end of an epoch that has failed: Abort on every rank, then a bounded wait for the sessions to end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence

import grpc

from tpmodel_worker.engine.errors import RankFailure
from tpmodel_worker.engine.session import RankChannel, Session

logger = logging.getLogger(__name__)

_ABORT_SHARE = 0.8
"""Of the time to drain after a fault, what the Abort calls may take; the rest is for the streams to end."""
_SILENT_SHARE = 0.15
"""Of that time, what a rank has that did not answer Ping before."""


async def abort_everywhere(
    channels: Sequence[RankChannel],
    sessions: Sequence[Session],
    *,
    epoch: int,
    reason: str,
    drain_seconds: float,
    silent: Collection[int] = (),
) -> list[RankFailure]:
    """Aborts on every rank, the failed ones too: a session may be gone while its process is not.

    silent: ranks that have shown that they answer nothing: they get a small part of the time.

    Returns, within drain_seconds, the ranks that did not confirm.
    """
    logger.warning("aborting the world: %s", reason, extra={"epoch": epoch})
    answers = await asyncio.gather(
        *(
            _abort_one(
                channel,
                session,
                epoch,
                reason,
                drain_seconds * _SILENT_SHARE if session.rank in silent else drain_seconds,
            )
            for channel, session in zip(channels, sessions, strict=True)
        )
    )
    return [answer for answer in answers if answer is not None]


async def _abort_one(
    channel: RankChannel, session: Session, epoch: int, reason: str, drain_seconds: float
) -> RankFailure | None:
    begun = time.monotonic()
    rank, failure = session.rank, None
    try:
        await channel.abort(epoch, reason, _ABORT_SHARE * drain_seconds)
    except grpc.aio.AioRpcError as error:
        failure = RankFailure(rank, f"did not confirm the abort ({error.code().name}: {error.details()})")
        logger.warning("rank %d %s", rank, failure.message, extra={"epoch": epoch, "rank": rank})
    # Whatever the rank had said before is still read; its session ends with this epoch.
    left = drain_seconds - (time.monotonic() - begun)
    await session.close(max(left, 0.0))
    return failure

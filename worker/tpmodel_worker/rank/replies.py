"""From a step's tensors to the replies of the session, in a thread of its own, so that the next step need not wait."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import google_crc32c
import numpy as np

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.errors import describe
from tpmodel_worker.rank.logprobs import SampledLogprobs
from tpmodel_worker.rank.session import AckPolicy
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.rank.upload import HostCopy

_logger = logging.getLogger(__name__)

Send = Callable[[pb.SessionResponse], None]


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """Log-probabilities of the N rows of a step that ask for them, on their way to the host."""

    rows: tuple[int, ...]
    """Which rows of the step."""
    counts: tuple[int, ...]
    """How many alternatives each wants."""
    chosen: HostCopy
    """(N,) float32."""
    top_values: HostCopy
    """(N, K) float32, best first; row i's are the first counts[i]."""
    top_ids: HostCopy
    """(N, K) int64."""

    @classmethod
    def of(cls, sampled: SampledLogprobs) -> Self:
        """Starts the copies."""
        return cls(
            rows=sampled.rows,
            counts=sampled.counts,
            chosen=HostCopy(sampled.chosen),
            top_values=HostCopy(sampled.top_values),
            top_ids=HostCopy(sampled.top_ids),
        )


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """One executed step (or a settled plan without one), on its way to the host."""

    seq: int
    step: int
    last: bool
    """The plan's last step."""
    ack_now: bool
    started: float
    """time.perf_counter() at the step's start."""
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """(R,) int64, the rows' slots."""
    sampled: HostCopy | None = None
    """(3, R) int64: token id, finished, 1 where the slot sampled and 0 where it idled."""
    logprobs: StepLogprobs | None = None


class StepChecksum:
    """CRC-32C over (seq, step, slot, token id, finished) of everything sampled in an epoch."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, seq: int, step: int, slots: np.ndarray, tokens: np.ndarray, finished: np.ndarray) -> None:
        """Takes one step in; parallel arrays, slots ascending."""
        words = np.empty((len(slots), 5), dtype="<u8")
        words[:, 0], words[:, 1] = seq, step
        words[:, 2], words[:, 3], words[:, 4] = slots, tokens, finished
        self.value = google_crc32c.extend(self.value, words.tobytes())


class ReplyThread:
    """Sends the replies of one epoch, in the order in which they were submitted.

    Rank 0 answers every step; other ranks answer by the cumulative policy.
    """

    def __init__(self, epoch: int, *, rank: int, status: StatusBoard, send: Send) -> None:
        self._epoch = epoch
        self._rank = rank
        self._status = status
        self._send = send
        self._queue: queue.SimpleQueue[StepOutcome | pb.SessionResponse | None] = queue.SimpleQueue()
        self._checksum = StepChecksum()
        self._policy = AckPolicy()
        # Of the last plan done, as it was then: the checksum goes on with the steps of the next plan.
        self._unacknowledged: pb.SessionResponse | None = None
        self._thread = threading.Thread(target=self._run, name=f"replies of epoch {epoch}", daemon=True)
        self._thread.start()

    def step(self, outcome: StepOutcome) -> None:
        """Submits a step."""
        self._queue.put(outcome)

    def response(self, response: pb.SessionResponse) -> None:
        """Submits a reply that needs no more work."""
        self._queue.put(response)

    def close(self, timeout: float) -> bool:
        """Ends the thread after what was submitted; False: it did not end in time (the device hangs)."""
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=self._policy.remaining(time.monotonic()))
            except queue.Empty:
                self._policy.flush()
                self._acknowledge()
                continue
            if item is None or isinstance(item, pb.SessionResponse):
                # What was done before is said before: the session ends only when every plan was answered.
                self._policy.flush()
                self._acknowledge()
            if item is None:
                return
            if isinstance(item, pb.SessionResponse):
                self._send(item)
                continue
            try:
                self._complete(item)
            except Exception as error:  # Whatever the device answers belongs in the reply.
                _logger.exception("step %d of plan %d failed", item.step, item.seq, extra={"epoch": self._epoch})
                self._send(pb.SessionResponse(epoch=self._epoch, seq=item.seq, error=describe(error)))

    def _complete(self, outcome: StepOutcome) -> None:
        reply = pb.GenerateStepOk(step=outcome.step)
        if outcome.sampled is not None:
            tokens, finished, sampled = outcome.sampled.wait()
            rows = np.argsort(outcome.slots, kind="stable")
            rows = rows[sampled[rows] != 0]
            slots, tokens, finished = outcome.slots[rows], tokens[rows], finished[rows]
            self._checksum.add(outcome.seq, outcome.step, slots, tokens, finished)
            if self._rank == 0:
                reply.slots.extend(slots.tolist())
                reply.token_ids.extend(tokens.tolist())
                reply.finished.extend(finished.tolist())
                if outcome.logprobs is not None:
                    reply.logprobs.extend(_token_logprobs(outcome.logprobs, rows))
        self._status.update(last_seq=outcome.seq, checksum=self._checksum.value)
        if self._rank == 0:
            reply.checksum = self._checksum.value
            reply.seconds = time.perf_counter() - outcome.started
            self._send(pb.SessionResponse(epoch=self._epoch, seq=outcome.seq, generate_step_ok=reply))
        elif outcome.last:
            reply.checksum = self._checksum.value
            self._unacknowledged = pb.SessionResponse(epoch=self._epoch, seq=outcome.seq, generate_step_ok=reply)
            if self._policy.done(time.monotonic(), ack_now=outcome.ack_now):
                self._acknowledge()

    def _acknowledge(self) -> None:
        if self._unacknowledged is not None:
            self._send(self._unacknowledged)
            self._unacknowledged = None


def _token_logprobs(logprobs: StepLogprobs, rows: np.ndarray) -> list[pb.TokenLogprobs]:
    """One entry for each of the step's rows that are reported, empty for those that do not ask."""
    chosen, top_values, top_ids = logprobs.chosen.wait(), logprobs.top_values.wait(), logprobs.top_ids.wait()
    entries = {
        row: pb.TokenLogprobs(
            logprob=float(chosen[place]),
            top_token_ids=top_ids[place, :count].tolist(),
            top_logprobs=top_values[place, :count].tolist(),
        )
        for place, (row, count) in enumerate(zip(logprobs.rows, logprobs.counts, strict=True))
    }
    return [entries.get(row, pb.TokenLogprobs()) for row in rows.tolist()]

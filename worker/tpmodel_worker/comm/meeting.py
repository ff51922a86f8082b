"""How the ranks of an epoch find out that all of them are there, before they first exchange tensors."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from tpmodel_worker.comm.communicator import CommunicatorAbortedError, CommunicatorError
from tpmodel_worker.comm.specification import CommunicatorSpec

_PRESENT = b"present"
_FIRST_POLL_SECONDS = 0.0005
_LAST_POLL_SECONDS = 0.01


class Meeting:
    """The epoch's part of the rendezvous store, with the deadline for building the world.

    Nothing blocks for longer than a poll without looking at `cancelled`, so that an abort ends it.
    """

    def __init__(self, spec: CommunicatorSpec, cancelled: threading.Event) -> None:
        """Connects to the store.

        Raises:
            CommunicatorError: there is none, up to the deadline.
            CommunicatorAbortedError: cancelled was set.
        """
        self._spec = spec
        self._cancelled = cancelled
        self._deadline = time.monotonic() + spec.timeout_seconds
        self.store = self._connect()

    def remaining(self) -> float:
        """Seconds until the deadline.

        Raises:
            CommunicatorError: it has passed.
            CommunicatorAbortedError: cancelled was set.
        """
        if self._cancelled.is_set():
            raise CommunicatorAbortedError(f"epoch {self._spec.epoch} was aborted while its world was built")
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise CommunicatorError(f"the world was not built within {self._spec.timeout_seconds} s")
        return left

    def wait_for_all(self, stage: str) -> None:
        """Tells the others that this rank has come to a stage; returns once all have.

        Raises:
            CommunicatorError: a rank reported a failure, or some did not come; names them.
            CommunicatorAbortedError: cancelled was set.
        """
        self._say(stage, _PRESENT)
        missing = set(range(self._spec.world_size))
        pause = _FIRST_POLL_SECONDS
        while missing:
            missing = {rank for rank in missing if not self._has_come(stage, rank)}
            if not missing:
                return
            try:
                self.remaining()
            except CommunicatorAbortedError:
                raise
            except CommunicatorError as error:
                names = ", ".join(f"rank {rank}" for rank in sorted(missing))
                raise CommunicatorError(f"{error}: {names} did not come to stage {stage!r}") from error
            self._cancelled.wait(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

    def report_failure(self, error: BaseException) -> None:
        """Tells the others that this rank will not come, so that they need not wait for the deadline."""
        text = f"{type(error).__name__}: {error}"
        try:
            self.store.set(f"failed/{self._spec.rank}", text)
        except DistError:
            # The store is gone: then nobody is waiting on it.
            return

    def _say(self, stage: str, text: bytes) -> None:
        try:
            self.store.set(f"{stage}/{self._spec.rank}", text.decode())
        except DistError as error:
            raise CommunicatorError(f"the rendezvous at {self._spec.rendezvous} is gone: {error}") from error

    def _has_come(self, stage: str, rank: int) -> bool:
        try:
            if self.store.check([f"failed/{rank}"]):
                reason = self.store.get(f"failed/{rank}").decode()
                raise CommunicatorError(f"rank {rank} could not join: {reason}")
            return self.store.check([f"{stage}/{rank}"])
        except DistError as error:
            raise CommunicatorError(f"the rendezvous at {self._spec.rendezvous} is gone: {error}") from error

    def _connect(self) -> Store:
        host, _, port_text = self._spec.rendezvous.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port_text.isdecimal():
            raise CommunicatorError(f"rendezvous {self._spec.rendezvous!r}: expected host:port")
        port = int(port_text)
        self._wait_until_listening(host, port)
        try:
            store = TCPStore(
                host,
                port,
                is_master=False,
                timeout=timedelta(seconds=self.remaining()),
                wait_for_workers=False,
            )
        except DistError as error:
            raise CommunicatorError(f"the rendezvous at {self._spec.rendezvous} refused: {error}") from error
        return PrefixStore(self._spec.rendezvous_id, store)

    def _wait_until_listening(self, host: str, port: int) -> None:
        """torch's own attempts to connect can't be interrupted, so they start when they will succeed."""
        pause = _FIRST_POLL_SECONDS
        refusal: OSError | None = None
        while True:
            try:
                left = self.remaining()
            except CommunicatorAbortedError:
                raise
            except CommunicatorError as error:
                raise CommunicatorError(f"no rendezvous at {self._spec.rendezvous}: {refusal or error}") from error
            try:
                socket.create_connection((host, port), timeout=left).close()
            except OSError as error:
                refusal = error
            else:
                return
            self._cancelled.wait(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

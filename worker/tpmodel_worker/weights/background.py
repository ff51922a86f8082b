"""What an update does beside the computing thread: joining the trainer's group, and receiving."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.weights.indexed import ReceivingFailedError, TrainerStoppedError

_JOIN_SECONDS = 10.0
# Failures whose message says it all: no traceback is logged.
_EXPECTED = (CommunicatorError, TimeoutError, TrainerStoppedError, ReceivingFailedError)

_logger = logging.getLogger(__name__)

Report = Callable[[pb.WeightUpdateStatus], None]


class BackgroundTask:
    """One job in a thread of its own; its state goes to the rank's status, for the engine to look at."""

    def __init__(
        self, job: Callable[[BackgroundTask], None], report: Report, *, step: int, total_bytes: int = 0
    ) -> None:
        """Starts it. job(task) may call task.progress."""
        self._job = job
        self._report = report
        self._step = step
        self._total_bytes = total_bytes
        self._received_bytes = 0
        self._signs = 0
        self.error = ""
        self.stopped = ""
        """The job may say that the trainer has ended the exchange, and how."""
        self.done = False
        self._tell()
        self._thread = threading.Thread(target=self._run, name="weight update", daemon=True)
        self._thread.start()

    def progress(self, received_bytes: int) -> None:
        """So much has come."""
        self._received_bytes = received_bytes
        self._signs += 1
        self._tell()

    def wait(self) -> bool:
        """Waits for the end of a job whose group was aborted; False when it does not come."""
        self._thread.join(_JOIN_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            # The weights are inference tensors: they may be overwritten in this mode only, which belongs to a thread.
            with torch.inference_mode():
                self._job(self)
        except _EXPECTED as error:
            self.error = str(error)
            _logger.warning("weight update: %s", error)
        except Exception as error:  # The boundary: the engine gets it.
            self.error = f"{type(error).__name__}: {error}"
            _logger.exception("weight update failed")
        self.done = True
        self._tell()

    def _tell(self) -> None:
        self._report(
            pb.WeightUpdateStatus(
                step=self._step,
                done=self.done,
                error=self.error,
                received_bytes=self._received_bytes,
                total_bytes=self._total_bytes,
                stopped=self.stopped,
                signs=self._signs,
            )
        )

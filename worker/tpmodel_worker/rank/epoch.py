"""What belongs to one epoch of a rank, and ends with it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.replies import ReplyThread
from tpmodel_worker.rank.runner import StepRunner

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Epoch:
    """Of the computing thread."""

    number: int
    replies: ReplyThread
    init: pb.InitRequest | None = None
    communicator: Communicator | None = None
    runner: StepRunner | None = None
    failed_seq: int = 0
    """The plan that failed: the slots are undefined since, until they are cleared."""

    def joined(self) -> Communicator:
        """The world's. Raises RequestError before Init."""
        if self.communicator is None:
            message = "the communicator was not built: Init comes first"
            raise RequestError(pb.ERROR_KIND_NCCL_NOT_INITIALISED, message)
        return self.communicator

    def close(self, seconds: float) -> None:
        """Gives everything back; replies that are on their way may take so long."""
        if not self.replies.close(seconds):
            _logger.error("the device does not finish its work", extra={"epoch": self.number})
        if self.communicator is not None:
            try:
                self.communicator.close()
            except CommunicatorError:
                _logger.warning("closing the communicator failed", exc_info=True, extra={"epoch": self.number})

"""What a session asks of this rank's model: that it is loaded, runs plans, and is unloaded."""

from __future__ import annotations

import logging
import time

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.kv.rank_handovers import Handovers
from tpmodel_worker.rank.epoch import Epoch
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.session import EpochGate
from tpmodel_worker.rank.shard import ShardHolder
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.weights.copying import WeightCopies
from tpmodel_worker.weights.updates import WeightUpdates

_PROGRESS_SECONDS = 0.1

_logger = logging.getLogger(__name__)


class ModelRequests:
    """Used by the computing thread. What the requests raise is what ShardHolder, StepRunner and Epoch.joined do."""

    def __init__(
        self,
        *,
        rank: int,
        device_id: str,
        gate: EpochGate,
        status: StatusBoard,
        shard: ShardHolder,
        updates: WeightUpdates,
        copies: WeightCopies,
        handovers: Handovers,
    ) -> None:
        """device_id: of the GPU, "" on CPU. updates, copies, handovers: use the shard's memory beside the plans."""
        self._rank = rank
        self._device_id = device_id
        self._gate = gate
        self._status = status
        self._shard = shard
        self._updates = updates
        self._copies = copies
        self._handovers = handovers

    def load(self, epoch: Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        """Loads the shard; the epoch's session hears how far it is."""
        communicator = epoch.joined()
        assert epoch.init is not None
        epoch.runner = None
        reported = 0.0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal reported
            self._gate.check(epoch.number)
            now = time.monotonic()
            if now - reported < _PROGRESS_SECONDS and done < total:
                return
            reported = now
            message = pb.Progress(what=what, done_bytes=done, total_bytes=total)
            self._status.progress(message)
            epoch.replies.response(pb.SessionResponse(epoch=epoch.number, seq=request.seq, progress=message))

        self._leave_handovers("a model is loaded")
        self._status.update(state="loading")
        pods = epoch.init.pods
        try:
            self._updates.decide(request.load_dense_shard)
            # That may have brought back what a copy had overwritten before.
            self.drop_unfinished()
            ok = self._shard.load(
                request.load_dense_shard,
                communicator,
                ranks_on_host=sum(pod == pods[self._rank] for pod in pods),
                progress=progress,
            )
        finally:
            self._show()
        ok.device_id = self._device_id
        self._updates.keep(request.load_dense_shard.persist_folder)
        return pb.SessionResponse(load_dense_shard_ok=ok)

    def clear(self, epoch: Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        """Empties cache and slots: plans may come."""
        communicator = epoch.joined()
        self._leave_handovers("the KV cache is emptied")
        epoch.runner = None
        clear = request.clear_kv_cache
        epoch.runner = self._shard.clear(clear.num_blocks, communicator, state_snapshots=clear.state_snapshots)
        epoch.failed_seq = 0
        self._show()
        self._status.update(state="serving", slots_used=0)
        return pb.SessionResponse(kv_cache_cleared=pb.KvCacheCleared(num_blocks=self._shard.kv_blocks))

    def generate(self, epoch: Epoch, seq: int, plan: pb.GenerateStepRequest) -> None:
        """Runs a plan; its steps are answered as they are done."""
        runner = epoch.runner
        if runner is None:
            what = "no model is loaded" if self._shard.loaded is None else "the KV cache was not made: ClearKvCache"
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, what)
        if plan.steps and (not self._updates.whole or self._copies.unfinished):
            what = "a copy" if self._copies.unfinished else "an update"
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, f"the weights are incomplete: {what} did not finish")
        if epoch.failed_seq:
            raise RequestError(
                pb.ERROR_KIND_ABORTED, f"plan {epoch.failed_seq} failed before: clear the KV cache first"
            )
        epoch.failed_seq = seq
        runner.execute(seq, plan, submit=epoch.replies.step, check=lambda: self._gate.check(epoch.number))
        epoch.failed_seq = 0
        if plan.releases or plan.admissions:
            self._status.update(slots_used=runner.slots.used)

    def unload(self, epoch: Epoch, _request: pb.SessionRequest) -> pb.SessionResponse:
        """Gives all memory of the model back."""
        epoch.runner = None
        self._updates.unload()
        self._leave_handovers("the model is unloaded")
        freed = self._shard.unload()
        self._copies.superseded()
        self._show()
        self._status.update(slots_used=0)
        return pb.SessionResponse(unloaded=pb.Unloaded(freed_bytes=freed))

    def drop_unfinished(self) -> None:
        """Unloads weights that a copy has overwritten in part: whoever loads next must not take them for whole."""
        if not self._copies.unfinished:
            return
        try:
            self._shard.unload()
        except ArenaError:
            # What is held of them says that nobody may use them.
            _logger.warning("the memory of a copy that was broken off is not given back", exc_info=True)
        self._copies.superseded()
        self._show()

    def _leave_handovers(self, reason: str) -> None:
        if not self._handovers.leave(reason):
            # Memory that a thread writes can't be given to anybody else.
            raise RequestError(pb.ERROR_KIND_INTERNAL, f"{reason}, but the thread of a transfer does not end")

    def _show(self) -> None:
        loaded = self._shard.loaded
        self._status.progress(None)
        self._status.update(
            state="loaded" if loaded is not None else "initialised",
            model_id=self._shard.model_id,
            weights_bytes=loaded.bytes if loaded is not None else 0,
            weights_digest=loaded.digest if loaded is not None else 0,
            bytes_read=loaded.bytes_read if loaded is not None else 0,
            weight_version=(loaded.weight_version or 0) if loaded is not None else 0,
            kv_bytes=self._shard.kv_bytes,
            kv_blocks=self._shard.kv_blocks,
        )

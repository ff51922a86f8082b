"""What a session asks of a rank that moves between this gang and others: weights, and requests' KV."""

from __future__ import annotations

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.kv.errors import KvMismatchError
from tpmodel_worker.kv.layout import KvLayout
from tpmodel_worker.kv.plan import plan_transfer
from tpmodel_worker.kv.rank_handovers import Handovers
from tpmodel_worker.rank.epoch import Epoch
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.shard import ShardHolder
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.weights.copying import WeightCopies
from tpmodel_worker.weights.updates import WeightUpdates


class TransferRequests:
    """Used by the computing thread; the bytes move in threads of their own."""

    def __init__(
        self,
        *,
        status: StatusBoard,
        shard: ShardHolder,
        updates: WeightUpdates,
        copies: WeightCopies,
        handovers: Handovers,
    ) -> None:
        """updates, copies, handovers: move what the shard holds."""
        self._status = status
        self._shard = shard
        self._updates = updates
        self._copies = copies
        self._handovers = handovers

    def update_weights(self, epoch: Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        """One step of a trainer's update. Raises RequestError, and what WeightUpdates.execute raises."""
        epoch.joined()
        if request.weight_update.HasField("begin"):
            self._copies.leave("a weight update begins")
        ok = self._updates.execute(request.weight_update)
        if not self._updates.whole:
            # It overwrites whatever a copy had left, and knows itself that this is not whole.
            self._copies.superseded()
        self._show_weights()
        return pb.SessionResponse(weight_update_ok=ok)

    def copy_weights(self, epoch: Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        """One step of a copy from or to another gang. Raises RequestError, and what WeightCopies.execute raises."""
        epoch.joined()
        ok = self._copies.execute(request.weight_copy)
        self._show_weights()
        return pb.SessionResponse(weight_copy_ok=ok)

    def transfer_kv(self, epoch: Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        """Begins this rank's part of a request's KV transfer. Raises RequestError, CommunicatorError."""
        transfer = request.kv_transfer
        layout = self._shard.kv_layout
        if layout is None or epoch.runner is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "there is no KV cache: load and clear come first")
        ok = pb.KvTransferOk()
        try:
            source, target = KvLayout.from_message(transfer.source), KvLayout.from_message(transfer.target)
            plan = plan_transfer(source, target)
            cache = self._shard.request_cache(blocks=transfer.blocks, slot=transfer.slot, tokens=transfer.tokens)
            match transfer.WhichOneof("role"):
                case "send" if source == layout:
                    ok.endpoints.extend(self._handovers.send(transfer, plan, cache))
                case "receive" if target == layout:
                    self._handovers.receive(transfer, plan, cache)
                case role:
                    raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, f"{role}: this rank's cache is {layout}")
        except (KvMismatchError, ValueError) as error:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, str(error)) from error
        return pb.SessionResponse(kv_transfer_ok=ok)

    def _show_weights(self) -> None:
        loaded = self._shard.loaded
        if loaded is not None:
            self._status.update(weight_version=loaded.weight_version or 0, weights_digest=loaded.digest)

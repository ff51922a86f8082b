"""What the runtime adds to the builders' children: who owns those of a gang, and how a gang is named to a builder."""

from __future__ import annotations

from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.kube import STATEFUL_SETS, Json
from tpmodel_operator.observed import Orders, StatefulSetRecord


def of_gang(record: StatefulSetRecord, orders: Orders | None = None) -> EnsureGang:
    """A gang that exists, as builders want it."""
    told = orders or Orders(attempt=1)
    return EnsureGang(
        name=record.name,
        index=record.index,
        revision=record.revision,
        image=record.image,
        attempt=told.attempt,
        rebuild=told.rebuild,
        model_revision=told.model_revision,
        weights_version=told.weights_version,
    )


def owned_by(stateful_set: str, uid: str, child: Json) -> Json:
    """The child of a gang, owned by the gang's StatefulSet: it is collected with it, even if the operator ends between
    two deletes, and no right to delete Secrets is needed."""
    owner = {
        "apiVersion": STATEFUL_SETS.api_version,
        "kind": STATEFUL_SETS.kind,
        "name": stateful_set,
        "uid": uid,
        "controller": True,
    }
    return child | {"metadata": child["metadata"] | {"ownerReferences": [owner]}}

"""A user's request for new worlds: an annotation of the TPModel, each new value of which counts once.

It reaches a gang as a counter in its ConfigMap, which its engine watches. Status is written first: what an operator
that dies leaves undone is seen by the next one as a ConfigMap that is behind.
"""

from __future__ import annotations

from dataclasses import replace

from tpmodel_operator import names
from tpmodel_operator.api import TPModel
from tpmodel_operator.gangs import Existence, Gang

LONGEST = 253
"""Characters of the value that are told apart; status cannot hold any length."""


def request(model: TPModel) -> str:
    """The value that gangs have been told of after this pass; an annotation that is taken away asks for nothing."""
    return model.annotations.get(names.REBUILD_ANNOTATION, "")[:LONGEST] or model.status.rebuild_requested


def is_new(model: TPModel) -> bool:
    """Whether the value asks for something. One that stands there at the first pass ever is none: it may be old."""
    return request(model) != model.status.rebuild_requested and model.status.observed_generation > 0


def asked(gang: Gang, model: TPModel) -> Gang:
    """The gang, asked once more where that is due; a mode without rebuilds is told so by an Event."""
    if not is_new(model) or model.spec.recovery.mode != "InPlace" or gang.existence is not Existence.LIVE:
        return gang
    raised = {"rebuilds_requested": gang.status.rebuilds_requested + 1}
    return replace(gang, status=gang.status.model_copy(update=raised))

"""Secret with a gang's token: whoever has it may command the gang's ranks."""

from __future__ import annotations

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel
from tpmodel_operator.resources.objects import Object, gang_metadata


def build(model: TPModel, gang: EnsureGang, *, token: str) -> Object:
    """The Secret of a gang, to be created, never applied: a token in use must not change."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": gang_metadata(model, gang, names.token_secret(gang.name)),
        "type": "Opaque",
        "immutable": True,
        "stringData": {names.TOKEN_KEY: token},
    }

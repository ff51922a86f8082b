"""spec.weightUpdates of a TPModel: who may send new weights into its gangs, and where those are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tpmodel_operator.api_kubernetes import NetworkPolicyPeer
from tpmodel_operator.api_types import CLAIM_RULE, FOLDER_RULE, LONGEST_TEXT, PATH_RULE, Model, checked, must

VolumeUri = Annotated[
    str,
    Field(
        max_length=LONGEST_TEXT,
        json_schema_extra=checked(
            must(
                "self.size() == 0 || self.startsWith('pvc://') || self.startsWith('file://')",
                "write pvc://claim/path, or file:///path (a folder of the node)",
            ),
            CLAIM_RULE,
            FOLDER_RULE,
            PATH_RULE,
        ),
    ),
]


class WeightUpdates(Model):
    """Live weight updates: new weights from a trainer, while the gangs serve."""

    from_: Annotated[list[NetworkPolicyPeer], Field(max_length=32, alias="from")] = []
    """Who may reach the ports of weight updates (9001, and 32768 to 65535 for the tensors), as the peers of a
    NetworkPolicy. Left out: nobody."""
    persist_updates: VolumeUri = ""
    """Where committed weights are kept in the background, so that a gang whose pods were all lost comes back with
    them: pvc://claim/path in a PersistentVolumeClaim of this namespace (ReadWriteMany when there is more than one
    pod), or file:///path, a folder of each node (only under prefixes that the operator's administrator allows). Left
    out: such a gang copies them from another gang, or waits for a trainer. Changing it is a rollout."""

"""What every member says of itself when the process group of an update is joined, whichever transport it is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.comm.specification import CommunicatorSpec


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Buffers that the trainer broadcasts once the group is joined, see weights/rehearsal.py."""

    buffer_bytes: int
    """Of each."""
    buffer_count: int
    dtype: str
    """Of the tensors to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMember:
    """One member: the trainer is rank 0, the ranks of all its gangs follow."""

    master_address: str
    """Where the trainer keeps the store."""
    master_port: int
    rank: int
    size: int
    """Members, the trainer included."""
    device: torch.device
    """Where the tensors are broadcast from and to."""
    address: str
    """IP of this member, to which everything that it listens on is bound; "": the way to the trainer."""
    backend: str = ""
    """nccl or gloo, the same for all members; empty: what the device's kind has."""
    timeout_seconds: float
    """How long joining may take."""
    deadline_seconds: float
    """How long a broadcast may wait for a member."""
    rehearsal: Rehearsal | None = None
    """Transport ordered: the same for all members."""

    def spec(self, rendezvous_id: str) -> CommunicatorSpec:
        """Of the group in which tensors are broadcast."""
        return CommunicatorSpec(
            epoch=0,
            rank=self.rank,
            world_size=self.size,
            rendezvous=join_host_port(self.master_address, self.master_port),
            rendezvous_id=rendezvous_id,
            timeout_seconds=self.timeout_seconds,
            # Members are never one pod: what they share is this group alone.
            pods=tuple(str(member) for member in range(self.size)),
            kind=self.backend or default_backend(self.device),
            address=self.address,
            deadline_seconds=self.deadline_seconds,
        )


def default_backend(device: torch.device) -> str:
    """Between members with one device of this kind each."""
    return "nccl" if device.type == "cuda" else "gloo"

"""The process group of weight updates: the trainer is rank 0, the ranks of all its gangs follow."""

from __future__ import annotations

import threading

import torch

from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.comm.build import build_communicator
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.comm.proof import prove_membership
from tpmodel_worker.comm.specification import CommunicatorSpec

_RENDEZVOUS_ID = "weight update"


def default_backend(device: torch.device) -> str:
    """Between members with one device of this kind each."""
    return "nccl" if device.type == "cuda" else "gloo"


def join_update_group(
    *,
    master_address: str,
    master_port: int,
    rank: int,
    size: int,
    device: torch.device,
    key: str,
    address: str,
    backend: str = "",
    timeout_seconds: float,
    deadline_seconds: float,
    cancelled: threading.Event | None = None,
) -> Communicator:
    """Joins; returns once every member has, and has proved to know the key. All members call it at the same time.

    Args:
        master_address: where the trainer keeps the store.
        master_port: of the store.
        rank: in the update group.
        size: members, the trainer included.
        device: where the tensors are broadcast from and to.
        key: what all members know, the same for all (auth.update_group_key).
        address: IP of this member, to which everything that it listens on is bound; "": the way to the trainer.
        backend: nccl or gloo, the same for all members; empty: what the device's kind has.
        timeout_seconds: how long joining may take.
        deadline_seconds: how long a broadcast may wait for a member.
        cancelled: another thread may set it to end the joining.

    Raises:
        CommunicatorError: a member did not come, or has another key.
    """
    spec = CommunicatorSpec(
        epoch=0,
        rank=rank,
        world_size=size,
        rendezvous=join_host_port(master_address, master_port),
        rendezvous_id=_RENDEZVOUS_ID,
        timeout_seconds=timeout_seconds,
        # Members are never one pod: what they share is this group alone.
        pods=tuple(str(member) for member in range(size)),
        kind=backend or default_backend(device),
        address=address,
        deadline_seconds=deadline_seconds,
    )
    group = build_communicator(spec, device=device, arenas=None, cancelled=cancelled)
    try:
        prove_membership(group, key, _RENDEZVOUS_ID)
    except CommunicatorError:
        group.abort("a member did not prove that it belongs to the group")
        group.close()
        raise
    return group

"""What a rank is told about the world it joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tpmodel_worker.comm.communicator import CommunicatorError

CommunicatorKind = Literal["single", "shared_memory", "gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommunicatorSpec:
    """One rank's part of one world; all but rank and address is the same on every rank."""

    epoch: int
    rank: int
    world_size: int
    rendezvous: str
    """host:port of the rendezvous store."""
    rendezvous_id: str
    """Prefix of the store's keys, another one for every epoch."""
    timeout_seconds: float
    """How long building may take."""
    pods: Sequence[str]
    """Pod of every rank, by rank."""
    kind: str = "auto"
    """auto, shared_memory, gloo or nccl. gloo takes tensors of a GPU through host memory: for ranks that share one."""
    address: str = ""
    """IP of this rank's pod: what a communicator listens on is reachable there only. Empty: where the way to the
    rendezvous begins."""
    deadline_seconds: float = 60.0
    """How long a collective may wait for a peer."""

    def check(self) -> None:
        """Raises CommunicatorError when no world can be built from this."""
        if self.world_size < 1:
            raise CommunicatorError(f"world size {self.world_size}: expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise CommunicatorError(f"rank {self.rank}: expected 0 to {self.world_size - 1}")
        if len(self.pods) != self.world_size:
            raise CommunicatorError(f"expected the pods of {self.world_size} ranks, got {len(self.pods)}")
        if self.kind not in ("auto", *get_args(CommunicatorKind)):
            raise CommunicatorError(f"unknown communicator {self.kind!r}")
        if self.timeout_seconds <= 0 or self.deadline_seconds <= 0:
            raise CommunicatorError(
                f"timeout {self.timeout_seconds} s and deadline {self.deadline_seconds} s: expected more than 0"
            )

    def resolve_kind(self, device_type: str) -> CommunicatorKind:
        """Which communicator this is on a device type.

        Raises:
            CommunicatorError: the kind that was asked for can't serve these ranks.
        """
        if self.world_size == 1:
            return "single"
        one_pod = len(set(self.pods)) == 1
        match self.kind:
            case "auto":
                if device_type == "cuda":
                    return "nccl"
                return "shared_memory" if one_pod else "gloo"
            case "shared_memory":
                if not one_pod:
                    raise CommunicatorError(f"shared_memory needs all ranks in one pod, they are in {set(self.pods)}")
                if device_type != "cpu":
                    raise CommunicatorError(f"shared_memory is for cpu, the device is {device_type}")
                return "shared_memory"
            case "gloo":
                return "gloo"
            case "nccl":
                if device_type != "cuda":
                    raise CommunicatorError(f"nccl is for cuda, the device is {device_type}")
                return "nccl"
            case _:
                raise CommunicatorError(f"{self.kind} is for one rank, the world has {self.world_size}")

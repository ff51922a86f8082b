"""How one end of a pipe is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPipeConfig:
    """One member of a ring: it sends to rank + 1 and receives from rank - 1, modulo the world size.

    All but rank, local_rank, device and address is the same on every member. Two members are the usual case.
    """

    rank: int
    world_size: int = 2
    address: str
    """IP of this member: everything that the pipe listens on is bound to it alone."""
    master_address: str
    """IP of member 0, which keeps the store through which they meet."""
    base_port: int
    port_offset: int = 0
    """The store's port is base_port + port_offset: pipes between the same hosts take different offsets."""
    token: str
    """Every connection proves to both sides that both know it; never sent."""
    device: str = "cpu"
    """"cuda": tensors are taken and made on cuda:local_rank; anything else: on the CPU."""
    local_rank: int = 0
    send_limit_bytes: int = 1 << 30
    """send waits while more than this is queued."""
    receive_limit_bytes: int = 1 << 30
    """The next item is not asked for while more than this is on its way or has come and was not taken."""
    max_tensor_bytes: int = 8 << 30
    """A larger tensor is refused, by its sender and by its receiver."""
    store_timeout_seconds: float = 300.0
    """How long making the pipe may take, until every member is connected."""
    deadline_seconds: float = 300.0
    """How long the peer may say nothing while it should, one wait in send may take, and close."""

    def __post_init__(self) -> None:
        if self.world_size < 2:
            raise ValueError(f"world_size {self.world_size}: a pipe has at least 2 members")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank}: expected 0 to {self.world_size - 1}")
        if not 0 < self.port < 1 << 16:
            raise ValueError(f"base_port {self.base_port} + port_offset {self.port_offset}: expected 1 to 65535")
        if not self.token:
            raise ValueError("token is empty: a pipe without authentication is not made")
        for name in ("send_limit_bytes", "receive_limit_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        for name in ("max_tensor_bytes", "store_timeout_seconds", "deadline_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive: {getattr(self, name)}")

    @property
    def port(self) -> int:
        """Of the store."""
        return self.base_port + self.port_offset

    def resolve_device(self) -> torch.device:
        """Where this end's tensors lie."""
        return torch.device("cuda", self.local_rank) if self.device == "cuda" else torch.device("cpu")

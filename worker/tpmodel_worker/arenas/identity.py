"""Names of arenas and of those who ask for them. Needs no torch: the supervisor uses it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

from tpmodel.v1 import worker_pb2

ArenaKind = Literal["weights", "kv", "comm"]

RENDEZVOUS_RANK = 0xFFFF_FFFF
"""Stands in the rank field of the hello that the rendezvous process sends."""
SPARE_RANK = 0xFFFF_FFFE
"""Stands for a spare, which has no rank yet."""


@dataclass(frozen=True, slots=True, order=True)
class ArenaId:
    """Which block of memory: a rank's first weights arena is ArenaId(rank, "weights", 0)."""

    rank: int
    kind: ArenaKind
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind} arena {self.number} of rank {self.rank}"

    def to_proto(self) -> worker_pb2.ArenaId:
        """The id as it goes over the wire."""
        return worker_pb2.ArenaId(rank=self.rank, kind=self.kind, number=self.number)

    @classmethod
    def from_proto(cls, message: worker_pb2.ArenaId) -> Self:
        """Reads what to_proto wrote; ValueError when the kind is none that is known."""
        if message.kind not in get_args(ArenaKind):
            raise ValueError(f"unknown arena kind {message.kind!r}: expected one of {', '.join(get_args(ArenaKind))}")
        return cls(message.rank, cast("ArenaKind", message.kind), message.number)

"""Which rank sends which heads to which rank, when a request's cache goes from one gang to another. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tpmodel_worker.kv.layout import KvLayout, check_compatible

PIECE_BYTES = 64 << 20
"""Of one rank's part of a layer, what is gathered and sent at a time."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank sends to another: these heads of every layer. Heads are counted over the whole model."""

    sender: int
    receiver: int
    heads: range
    """Of layers that keep keys and values."""
    key_heads: range
    """Of layers that keep a state."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens first to first + count - 1 of one layer."""

    layer: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """The whole transfer, as both gangs see it."""

    source: KvLayout
    target: KvLayout
    parts: tuple[Part, ...]
    """Every (layer, head) that a receiver holds is in exactly one of its parts."""

    def of_sender(self, rank: int) -> list[Part]:
        """What a rank of the source sends, by receiver."""
        return [part for part in self.parts if part.sender == rank]

    def of_receiver(self, rank: int) -> list[Part]:
        """What a rank of the target gets, by sender."""
        return [part for part in self.parts if part.receiver == rank]

    def pieces(self, tokens: int) -> Iterator[Piece]:
        """What is sent one after the other, the same for all parts: layer by layer, long requests in several pieces."""
        heads = max(len(part.heads) for part in self.parts)
        row_bytes = 2 * heads * self.source.head_dim * _ITEM_BYTES[self.source.dtype]
        most = max(1, PIECE_BYTES // row_bytes)
        for layer in range(self.source.layers):
            for first in range(0, tokens, most):
                yield Piece(layer, first, min(most, tokens - first))


def plan_transfer(source: KvLayout, target: KvLayout) -> TransferPlan:
    """Plans. Each receiver gets what it holds, from one of those that hold it; replicas share the work.

    Raises:
        KvMismatchError: what the source keeps is of no use to the target; names both values.
    """
    check_compatible(source, target)
    heads: dict[tuple[int, int], list[int]] = {}
    key_heads: dict[tuple[int, int], list[int]] = {}
    for receiver in range(target.ranks):
        for head in target.heads_of(receiver):
            heads.setdefault((_holder(source, target, receiver, head), receiver), []).append(head)
        for head in target.key_heads_of(receiver):
            share = len(source.key_heads_of(0))
            key_heads.setdefault((head // share, receiver), []).append(head)
    pairs = sorted(heads.keys() | key_heads.keys())
    parts = [Part(*pair, _as_range(heads.get(pair, [])), _as_range(key_heads.get(pair, []))) for pair in pairs]
    return TransferPlan(source, target, tuple(parts))


def _holder(source: KvLayout, target: KvLayout, receiver: int, head: int) -> int:
    """The rank of the source that sends a head to a receiver."""
    if source.replicas == 1:
        return head // len(source.heads_of(0))
    # Receivers that hold the same head ask different holders, as far as there are enough.
    place = receiver % target.replicas
    return head * source.replicas + place * source.replicas // target.replicas


def _as_range(heads: list[int]) -> range:
    """Heads of one holder follow each other."""
    return range(heads[0], heads[-1] + 1) if heads else range(0)

"""Which rank sends which heads to which rank, when a request's cache goes from one gang to another. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tpmodel_worker.kv.layout import KvLayout, check_compatible

_NCCL_PIECE_BYTES = 128 << 20
"""Most that is gathered and sent at a time between GPUs: what moves in longer than the host needs to ask for it."""
_GLOO_PIECE_BYTES = 16 << 20
"""The same through the memory of hosts, where every piece wakes threads on both sides."""
MOST_PIECE_BYTES = 1 << 30
_LEAST_PIECES = 4
"""Fewer would leave nothing to gather while another piece is on its way."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def usual_piece_bytes(*, nccl: bool) -> int:
    """What is sent at a time where bytes move in that way."""
    return _NCCL_PIECE_BYTES if nccl else _GLOO_PIECE_BYTES


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
    """The tokens first to first + count - 1 of some layers that follow each other: all tokens, where it is several."""

    layers: range
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

    def pieces(self, part: Part, tokens: int, most_bytes: int) -> list[Piece]:
        """What is sent one after the other, layer by layer: of about one size, none of more than most_bytes."""
        layer_bytes = tokens * 2 * len(part.heads) * self.source.head_dim * _ITEM_BYTES[self.source.dtype]
        if not layer_bytes:
            return []
        layers = self.source.layers
        at_a_time = max(1, min(most_bytes // layer_bytes, layers // _LEAST_PIECES))
        count = -(-tokens // -(-layer_bytes // most_bytes))
        return [
            Piece(range(layer, min(layer + at_a_time, layers)), first, min(count, tokens - first))
            for layer in range(0, layers, at_a_time)
            for first in range(0, tokens, count)
        ]

    def turns(
        self, parts: Sequence[Part], tokens: int, most_bytes: Mapping[tuple[int, int], int]
    ) -> Iterator[tuple[Part, Piece]]:
        """A rank's parts, in the order in which their pieces are sent, and received.

        The first pieces of all parts, then the second ones, and so on: every rank takes the pieces that it has to do
        with in the order of (number, sender, receiver), so that no ring of ranks waits for each other.

        Args:
            parts: of one rank, from of_sender or of_receiver.
            tokens: of the request.
            most_bytes: of a piece, by sender and receiver.
        """
        lists = [self.pieces(part, tokens, most_bytes[part.sender, part.receiver]) for part in parts]
        for number in range(max(map(len, lists), default=0)):
            for part, pieces in zip(parts, lists, strict=True):
                if number < len(pieces):
                    yield part, pieces[number]


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

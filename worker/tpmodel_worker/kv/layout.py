"""What one gang's cache of a request is like, so that two gangs can find out what of it goes where. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from tpmodel.v1 import kv_pb2 as pb
from tpmodel_worker.kv.errors import KvMismatchError


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayout:
    """The layers that keep a state of fixed size instead of keys and values (linear attention)."""

    layers: int
    key_heads: int
    """Of the whole model; the ranks split them evenly, each with its value heads."""
    value_heads: int
    """Of one key head."""
    key_dim: int
    value_dim: int
    taps: int
    """Tokens that the convolution looks back."""

    @classmethod
    def from_message(cls, message: pb.KvStateLayout) -> Self:
        """Reads what to_message wrote."""
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})

    def to_message(self) -> pb.KvStateLayout:
        """As it goes over the wire."""
        return pb.KvStateLayout(**dataclasses.asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """The cache of a whole gang. Heads are counted over the whole model."""

    model_id: str
    config_digest: str
    """Of the checkpoint's config.json."""
    dtype: str
    layers: int
    """Those that keep keys and values."""
    kv_heads: int
    head_dim: int
    block_size: int
    ranks: int
    state: StateLayout | None = None

    def heads_of(self, rank: int) -> range:
        """KV heads that a rank holds. With fewer heads than ranks, neighbouring ranks hold the same one."""
        if self.kv_heads >= self.ranks:
            share = self.kv_heads // self.ranks
            return range(rank * share, (rank + 1) * share)
        head = rank // self.replicas
        return range(head, head + 1)

    def key_heads_of(self, rank: int) -> range:
        """Key heads of the states that a rank holds; none where the model keeps no state."""
        share = self.state.key_heads // self.ranks if self.state is not None else 0
        return range(rank * share, (rank + 1) * share)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same KV heads."""
        return max(1, self.ranks // self.kv_heads)

    @classmethod
    def from_message(cls, message: pb.KvLayout) -> Self:
        """Reads what to_message wrote. Raises KvMismatchError where a number can't be."""
        for name in ("layers", "kv_heads", "head_dim", "block_size", "ranks"):
            if getattr(message, name) < 1:
                raise KvMismatchError(f"{name} of the other gang is {getattr(message, name)}: at least 1")
        values = {field.name: getattr(message, field.name) for field in dataclasses.fields(cls)}
        values["state"] = StateLayout.from_message(message.state) if message.HasField("state") else None
        return cls(**values)

    def to_message(self) -> pb.KvLayout:
        """As it goes over the wire."""
        message = pb.KvLayout(**{k: v for k, v in dataclasses.asdict(self).items() if k != "state"})
        if self.state is not None:
            message.state.CopyFrom(self.state.to_message())
        return message


def check_compatible(source: KvLayout, target: KvLayout) -> None:
    """Returns if what one gang keeps can be used by the other; block size and number of ranks may differ.

    Raises:
        KvMismatchError: it can't; names what differs, and both values.
    """
    for field in dataclasses.fields(KvLayout):
        if field.name in ("block_size", "ranks"):
            continue
        ours, theirs = getattr(source, field.name), getattr(target, field.name)
        if ours != theirs:
            raise KvMismatchError(
                f"{field.name}: the gang that keeps the KV has {ours!r}, the one that asks {theirs!r}"
            )

"""How a trainer sends weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from tpmodel_worker.weights.packing import MAX_BUFFERS

_DEVICES = re.compile(r"cpu|cuda(:\d+)?")
Mode = Literal["in_place", "shadow"]
Transport = Literal["ordered", "indexed"]
Running = Literal["finish", "keep", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """The trainer decides; the ranks do as they are told. Every field has a default."""

    mode: Mode = "in_place"
    """in_place overwrites the weights in use, generation pauses; shadow fills a second arena while the old serves."""
    transport: Transport = "ordered"
    """ordered: what comes next is announced, members prove to know the token. indexed: an index goes before every
    tensor, as trainers do it that use tpmodel-weight-updater; slower, and whoever has the address may send."""
    packed: bool = True
    """Many tensors in one broadcast; otherwise one for each."""
    buffer_size: int = 1 << 28
    """Bytes over which a chunk of packed tensors is closed."""
    buffer_count: int = 2
    """Chunks under way at the same time; each takes a buffer, here and on every rank."""
    group_bytes: int = 4 << 30
    """Tensors of an iterator are announced in groups of about this size, and held here until they are sent."""
    device: str = "cpu"
    """Where the trainer sends from: cpu, or cuda:N. The gangs' kind of device."""
    backend: Literal["", "nccl", "gloo"] = ""
    """Of all members; empty: nccl on GPUs, gloo on CPUs. gloo also takes GPUs that several members share, slowly."""
    address: str = ""
    """IP of the trainer that the ranks reach it by; empty: the one from which it reaches the first gang."""
    join_seconds: float = 60.0
    """How long joining the group may take."""
    deadline_seconds: float = 120.0
    """How long one broadcast, and the pause between two calls, may take."""

    def __post_init__(self) -> None:
        for name in ("buffer_size", "buffer_count", "group_bytes"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is {getattr(self, name)!r}: a whole number")
        for name in ("join_seconds", "deadline_seconds"):
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name} is {getattr(self, name)!r}: a number of seconds")
        if not _DEVICES.fullmatch(str(self.device)):
            raise ValueError(f"device is {self.device!r}: cpu, cuda or cuda:N")
        if self.mode not in ("in_place", "shadow"):
            raise ValueError(f"mode is {self.mode!r}: in_place or shadow")
        if self.transport not in ("ordered", "indexed"):
            raise ValueError(f"transport is {self.transport!r}: ordered or indexed")
        if self.backend not in ("", "nccl", "gloo"):
            raise ValueError(f"backend is {self.backend!r}: nccl or gloo")
        if self.buffer_size < 1 or self.group_bytes < 1:
            raise ValueError(f"buffer_size {self.buffer_size} and group_bytes {self.group_bytes}: at least 1")
        if not 1 <= self.buffer_count <= MAX_BUFFERS:
            raise ValueError(f"buffer_count is {self.buffer_count}: 1 to {MAX_BUFFERS}")
        if self.join_seconds <= 0 or self.deadline_seconds <= 0:
            raise ValueError(f"join_seconds {self.join_seconds}, deadline_seconds {self.deadline_seconds}: above 0")

    @classmethod
    def of(cls, options: Self | Mapping[str, Any] | None) -> Self:
        """Takes the dataclass or a dict of its fields. Raises ValueError for a field that there is not."""
        if options is None:
            return cls()
        if isinstance(options, cls):
            return options
        assert isinstance(options, Mapping)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}: expected some of {', '.join(sorted(known))}")
        return cls(**options)

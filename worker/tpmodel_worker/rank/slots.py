"""The running sequences of a rank: what the host knows of each, and what only the device knows."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.upload import upload

_NO_TOKEN = -1


class Phase(enum.IntEnum):
    """What a slot can do next."""

    FREE = 0
    PREFILL = 1
    """Known tokens are left to compute."""
    DECODE = 2
    """It has sampled: its last token is on the device."""


@dataclass(frozen=True, slots=True)
class SlotLimits:
    """The sizes that every slot index and block id is checked against."""

    max_slots: int
    block_size: int
    max_blocks: int
    """Blocks of one sequence at most."""
    num_blocks: int
    """Blocks of the cache, without the scratch block."""
    snapshots: int = 0
    """Places for copies of recurrent state."""


class HostSlots:
    """What the host knows of every slot without waiting for the device, as arrays over slots."""

    def __init__(self, limits: SlotLimits) -> None:
        slots = limits.max_slots
        self.phase = np.zeros(slots, dtype=np.uint8)
        self.computed = np.zeros(slots, dtype=np.int64)
        """Tokens with KV: exact in prefill; in decode an upper bound, since the slot may have finished."""
        self.known = np.zeros(slots, dtype=np.int64)
        """Tokens that the admission brought."""
        self.most_computed = np.zeros(slots, dtype=np.int64)
        """What computed can reach: the last token before max_tokens ends the sequence is never computed."""
        self.block_counts = np.zeros(slots, dtype=np.int64)
        self.block_tables = np.zeros((slots, limits.max_blocks), dtype=np.int32)
        self.tokens: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * slots
        self.snapshots: list[bytes] = [b""] * limits.snapshots
        """Which tokens each snapshot of recurrent state was made behind, as tokens_digest; empty: there is none."""


def tokens_digest(tokens: np.ndarray) -> bytes:
    """Names the beginning of a sequence: (N,) int64."""
    return blake2b(tokens.tobytes(), digest_size=16).digest()


class SlotTable:
    """All slots, on the host and on the device. Plans are checked (plan_check) before they are applied here.

    Device tensors, over slots: last_token, computed, output_counts, max_tokens int64; finished bool;
    stop_ids (slots, longest list) int64 padded with -1; block_tables (slots, max_blocks) int32.
    """

    def __init__(self, limits: SlotLimits, device: torch.device) -> None:
        self.limits = limits
        self.host = HostSlots(limits)
        self._device = device
        slots = limits.max_slots
        self.last_token = torch.zeros(slots, dtype=torch.int64, device=device)
        self.computed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.output_counts = torch.zeros(slots, dtype=torch.int64, device=device)
        self.max_tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.finished = torch.zeros(slots, dtype=torch.bool, device=device)
        self.stop_ids = torch.full((slots, 1), _NO_TOKEN, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros((slots, limits.max_blocks), dtype=torch.int32, device=device)

    @property
    def used(self) -> int:
        """Slots that hold a sequence."""
        return int(np.count_nonzero(self.host.phase))

    def release(self, slots: Iterable[int]) -> None:
        """Empties slots."""
        for slot in slots:
            self.host.phase[slot] = Phase.FREE
            self.host.block_counts[slot] = 0
            self.host.tokens[slot] = np.empty(0, dtype=np.int64)

    def admit(self, admissions: Sequence[pb.Admission]) -> None:
        """Fills slots."""
        if not admissions:
            return
        host = self.host
        rows = np.empty((4, len(admissions)), dtype=np.int64)
        for column, admission in enumerate(admissions):
            slot = admission.slot
            tokens = np.array(admission.token_ids, dtype=np.int64)
            host.phase[slot] = Phase.PREFILL
            host.tokens[slot] = tokens
            host.known[slot] = len(tokens)
            host.computed[slot] = admission.computed_length
            host.most_computed[slot] = admission.prompt_length + admission.sampling.max_tokens - 1
            host.block_counts[slot] = 0
            rows[:, column] = (
                slot,
                admission.computed_length,
                len(tokens) - admission.prompt_length,
                admission.sampling.max_tokens,
            )
        stops = self._stop_rows(admissions)
        slots, computed, outputs, max_tokens, stop_values = upload([*rows, stops.reshape(-1)], self._device)
        self.computed.index_copy_(0, slots, computed)
        self.output_counts.index_copy_(0, slots, outputs)
        self.max_tokens.index_copy_(0, slots, max_tokens)
        self.finished.index_fill_(0, slots, value=False)
        self.stop_ids.index_copy_(0, slots, stop_values.view(stops.shape))

    def _stop_rows(self, admissions: Sequence[pb.Admission]) -> np.ndarray:
        longest = max(len(admission.sampling.stop_token_ids) for admission in admissions)
        width = self.stop_ids.shape[1]
        if longest > width:
            wider = torch.full((self.limits.max_slots, longest), _NO_TOKEN, dtype=torch.int64, device=self._device)
            wider[:, :width] = self.stop_ids
            self.stop_ids, width = wider, longest
        rows = np.full((len(admissions), width), _NO_TOKEN, dtype=np.int64)
        for row, admission in zip(rows, admissions, strict=True):
            ids = admission.sampling.stop_token_ids
            row[: len(ids)] = ids
        return rows

    def note_saves(self, saves: Sequence[pb.StateSave]) -> None:
        """Slots' states were copied as they are now."""
        host = self.host
        for save in saves:
            host.snapshots[save.snapshot] = tokens_digest(host.tokens[save.slot][: host.computed[save.slot]])

    def extend(self, deltas: Sequence[pb.BlockTableDelta]) -> None:
        """Writes blocks into block tables."""
        if not deltas:
            return
        host = self.host
        changed: list[np.ndarray] = []
        for delta in deltas:
            end = delta.start + len(delta.blocks)
            host.block_tables[delta.slot, delta.start : end] = delta.blocks
            host.block_counts[delta.slot] = max(int(host.block_counts[delta.slot]), end)
            changed.append(np.arange(delta.start, end, dtype=np.int64) + delta.slot * self.limits.max_blocks)
        cells = np.concatenate(changed)
        index, blocks = upload([cells, host.block_tables.reshape(-1)[cells].astype(np.int64)], self._device)
        self.block_tables.view(-1).index_copy_(0, index, blocks.to(torch.int32))

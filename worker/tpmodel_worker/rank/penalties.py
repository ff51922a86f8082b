"""Penalties for tokens that were seen before, and the mask that keeps sequences alive until min_tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tpmodel_worker.rank.device_values import device_values
from tpmodel_worker.rank.token_keys import row_blocks

_FIRST_CAPACITY = 4


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """The rows of a batch that use penalties; N of them."""

    rows: torch.Tensor
    """(N,) int64, rows of the scores."""
    batch_rows: torch.Tensor
    """(N,) int64, rows of the whole batch, where the sampled tokens are."""
    stored_rows: torch.Tensor
    """(N,) int64, rows of PenaltyCounts."""
    repetition: torch.Tensor
    """(N, 1) float32, 1: off."""
    presence: torch.Tensor
    """(N, 1) float32, 0: off."""
    frequency: torch.Tensor
    """(N, 1) float32, 0: off."""


class PenaltyCounts:
    """How often each token of this rank's vocabulary shard was seen, for the slots that use penalties.

    Memory grows with the number of such slots (5 bytes for each token of the shard and slot) and is given
    back when the last of them goes.
    """

    def __init__(self, *, vocab_start: int, vocab_shard: int, device: torch.device) -> None:
        self._vocab_start = vocab_start
        self._vocab_shard = vocab_shard
        self._device = device
        self._stored_rows: dict[int, int] = {}
        self._free_rows: list[int] = []
        self._outputs, self._in_prompt = self._allocate(0)

    def admit(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Starts counting for a slot, from what is known already. Replaces what the slot held."""
        if slot not in self._stored_rows:
            if not self._free_rows:
                self._grow()
            self._stored_rows[slot] = self._free_rows.pop()
        row = self._stored_rows[slot]
        outputs = self._local(output_ids)
        self._in_prompt[row].zero_().index_fill_(0, self._local(prompt_ids), True)
        self._outputs[row].zero_().index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def release(self, slot: int) -> None:
        """Forgets a slot; one without counts is ignored."""
        row = self._stored_rows.pop(slot, None)
        if row is None:
            return
        self._free_rows.append(row)
        if not self._stored_rows:
            self._free_rows.clear()
            self._outputs, self._in_prompt = self._allocate(0)

    @property
    def bytes(self) -> int:
        """Device memory held."""
        return self._outputs.nbytes + self._in_prompt.nbytes

    def stored_row(self, slot: int) -> int:
        """Where the slot's counts are, for PenaltyRows. Valid until the slot's release."""
        return self._stored_rows[slot]

    def apply(self, scores: torch.Tensor, penalised: PenaltyRows) -> None:
        """Changes rows of the scores (P, vocab_shard) float32, in place.

        Repetition: a score of a token of prompt or output is divided by the penalty where positive, multiplied
        where negative. Then presence is subtracted once for a token of the output, and frequency as often as the
        output has it.
        """
        for block in row_blocks(penalised.rows.shape[0], self._vocab_shard, self._device):
            stored = penalised.stored_rows[block]
            outputs = self._outputs.index_select(0, stored)
            in_output = outputs > 0
            seen = in_output | self._in_prompt.index_select(0, stored)
            values = scores.index_select(0, penalised.rows[block])
            repetition = penalised.repetition[block]
            values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
            values -= outputs * penalised.frequency[block]
            values -= in_output * penalised.presence[block]
            scores.index_copy_(0, penalised.rows[block], values)

    def count(self, token_ids: torch.Tensor, active: torch.Tensor, penalised: PenaltyRows) -> None:
        """Counts the batch's sampled tokens: token_ids (R,) int64, for the rows that are active (R,) bool."""
        columns = token_ids.index_select(0, penalised.batch_rows) - self._vocab_start
        counted = active.index_select(0, penalised.batch_rows) & (columns >= 0) & (columns < self._vocab_shard)
        columns.clamp_(0, self._vocab_shard - 1)
        # Each row comes once, so no two of these updates meet.
        self._outputs[penalised.stored_rows, columns] += counted

    def _local(self, token_ids: Iterable[int]) -> torch.Tensor:
        """(n,) int64: the columns of those ids that this rank's shard holds."""
        columns = [token_id - self._vocab_start for token_id in token_ids]
        return device_values(
            [column for column in columns if 0 <= column < self._vocab_shard], torch.int64, self._device
        )

    def _grow(self) -> None:
        old_capacity = self._outputs.shape[0]
        capacity = max(_FIRST_CAPACITY, 2 * old_capacity)
        outputs, in_prompt = self._allocate(capacity)
        outputs[:old_capacity], in_prompt[:old_capacity] = self._outputs, self._in_prompt
        self._outputs, self._in_prompt = outputs, in_prompt
        self._free_rows.extend(range(capacity - 1, old_capacity - 1, -1))

    def _allocate(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Inference tensors could only be changed in inference mode, and these outlive the mode they are made in.
        with torch.inference_mode(mode=False):
            shape = (capacity, self._vocab_shard)
            return (
                torch.zeros(shape, dtype=torch.int32, device=self._device),
                torch.zeros(shape, dtype=torch.bool, device=self._device),
            )


@dataclass(frozen=True, slots=True)
class StopMask:
    """The stop ids of this rank's shard that wait for min_tokens, one entry for each (row, id): M of them."""

    rows: torch.Tensor
    """(M,) int64, rows of the scores."""
    batch_rows: torch.Tensor
    """(M,) int64, rows of the whole batch."""
    columns: torch.Tensor
    """(M,) int64, columns of the scores."""
    min_tokens: torch.Tensor
    """(M,) int64."""

    def apply(self, scores: torch.Tensor, output_counts: torch.Tensor) -> None:
        """Sets stop ids to -inf, in place, in rows of fewer output tokens (output_counts: (R,)) than min_tokens."""
        waiting = output_counts.index_select(0, self.batch_rows) < self.min_tokens
        values = scores[self.rows, self.columns]
        scores[self.rows, self.columns] = values.masked_fill(waiting, -torch.inf)

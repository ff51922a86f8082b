"""What sampling one batch of slots takes, worked out from host-known settings and kept while the batch stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tpmodel_worker.rank.device_values import device_values
from tpmodel_worker.rank.logprobs import LogprobRows
from tpmodel_worker.rank.penalties import PenaltyRows, StopMask
from tpmodel_worker.rank.slot_settings import RowKind, SlotSettings
from tpmodel_worker.rank.truncation import CandidateLimits, ShardedLimits


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Processed rows with a temperature above 0; N of them."""

    rows: slice
    """Rows of the scores."""
    batch_rows: torch.Tensor
    """(N,) int64, rows of the whole batch."""
    temperatures: torch.Tensor
    """(N, 1) float32."""
    seeds: torch.Tensor
    """(N,) int64."""
    sample_indices: torch.Tensor
    """(N,) int64."""


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How a batch is sampled. Its scores are a copy of the P processed rows' logits, sorted by RowKind.

    All other rows are plain: the arg-max of the logits themselves.
    """

    has_plain_rows: bool
    processed: torch.Tensor | None
    """(P,) int64, rows of the batch; None where all rows are plain."""
    arg_max_rows: slice
    """Rows of the scores whose token is the arg-max over all shards, of noisy scores where sampled."""
    sampled: SampledRows | None
    sharded_limits: tuple[ShardedLimits, ...]
    candidates: CandidateLimits | None
    penalties: PenaltyRows | None
    stops: StopMask | None
    logprobs: LogprobRows | None

    @property
    def needs_arg_max(self) -> bool:
        """Whether any row's token is an arg-max over all shards."""
        return self.has_plain_rows or self.arg_max_rows.stop > 0


def plan_sampling(
    settings: Sequence[SlotSettings],
    slots: Sequence[int],
    stored_row: Callable[[int], int],
    *,
    vocab_start: int,
    vocab_shard: int,
    device: torch.device,
) -> SamplingPlan:
    """Plans a batch.

    Args:
        settings: of each row of the batch.
        slots: of each row of the batch.
        stored_row: slot to its row in PenaltyCounts, for slots that use penalties.
        vocab_start: this rank's first vocabulary id.
        vocab_shard: this rank's number of columns.
        device: where the plan's tensors go.
    """
    builder = _PlanBuilder(settings, device)
    logprobs = builder.logprobs()
    if not builder.processed:
        return SamplingPlan(True, None, slice(0, 0), None, (), None, None, None, logprobs)
    return SamplingPlan(
        has_plain_rows=len(builder.processed) < len(settings),
        processed=builder.values(builder.processed, torch.int64),
        arg_max_rows=slice(0, builder.span(RowKind.CANDIDATES).start),
        sampled=builder.sampled(),
        sharded_limits=builder.sharded_limits(),
        candidates=builder.candidates(),
        penalties=builder.penalties(slots, stored_row),
        stops=builder.stops(vocab_start, vocab_shard),
        logprobs=logprobs,
    )


class _PlanBuilder:
    """Holds what the parts of a plan are made from: `processed` are the batch rows in the order of the scores."""

    def __init__(self, settings: Sequence[SlotSettings], device: torch.device) -> None:
        self._batch = settings
        self._device = device
        rows = (row for row, row_settings in enumerate(settings) if not row_settings.plain)
        self.processed = sorted(rows, key=lambda row: settings[row].kind)
        self._settings = [settings[row] for row in self.processed]

    def values(self, values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return device_values(values, dtype, self._device)

    def column(self, values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return self.values(values, dtype).unsqueeze(1)

    def span(self, first: RowKind, last: RowKind | None = None) -> slice:
        """The scores' rows of the kinds first to last."""
        kinds = [settings.kind for settings in self._settings]
        start = sum(kind < first for kind in kinds)
        return slice(start, start + sum(first <= kind <= (first if last is None else last) for kind in kinds))

    def sampled(self) -> SampledRows | None:
        rows = self.span(RowKind.UNTRUNCATED, RowKind.CANDIDATES)
        settings = self._settings[rows]
        if not settings:
            return None
        return SampledRows(
            rows=rows,
            batch_rows=self.values(self.processed[rows], torch.int64),
            temperatures=self.column([row.temperature for row in settings], torch.float32),
            seeds=self.values([row.seed for row in settings], torch.int64),
            sample_indices=self.values([row.sample_index for row in settings], torch.int64),
        )

    def sharded_limits(self) -> tuple[ShardedLimits, ...]:
        limits: list[ShardedLimits] = []
        for kind in (RowKind.MIN_P, RowKind.TOP_P, RowKind.TOP_K_TOP_P, RowKind.TOP_K):
            rows = self.span(kind)
            settings = self._settings[rows]
            if not settings:
                continue
            with_top_k = kind in (RowKind.TOP_K_TOP_P, RowKind.TOP_K)
            with_top_p = kind in (RowKind.TOP_P, RowKind.TOP_K_TOP_P)
            with_min_p = any(row.min_p > 0 for row in settings)
            limits.append(
                ShardedLimits(
                    rows=rows,
                    top_k=self.column([row.top_k for row in settings], torch.int64) if with_top_k else None,
                    top_p=self.column([row.top_p for row in settings], torch.float64) if with_top_p else None,
                    log_min_p=self._log_min_p(settings) if with_min_p else None,
                )
            )
        return tuple(limits)

    def candidates(self) -> CandidateLimits | None:
        rows = self.span(RowKind.CANDIDATES)
        settings = self._settings[rows]
        if not settings:
            return None
        return CandidateLimits(
            rows=rows,
            count=max(row.top_k for row in settings),
            top_k=self.column([row.top_k for row in settings], torch.int64),
            top_p=self.column([row.top_p for row in settings], torch.float64),
            log_min_p=self._log_min_p(settings),
        )

    def penalties(self, slots: Sequence[int], stored_row: Callable[[int], int]) -> PenaltyRows | None:
        rows = [row for row, settings in enumerate(self._settings) if settings.penalised]
        if not rows:
            return None
        settings = [self._settings[row] for row in rows]
        batch_rows = [self.processed[row] for row in rows]
        return PenaltyRows(
            rows=self.values(rows, torch.int64),
            batch_rows=self.values(batch_rows, torch.int64),
            stored_rows=self.values([stored_row(slots[row]) for row in batch_rows], torch.int64),
            repetition=self.column([row.repetition_penalty for row in settings], torch.float32),
            presence=self.column([row.presence_penalty for row in settings], torch.float32),
            frequency=self.column([row.frequency_penalty for row in settings], torch.float32),
        )

    def stops(self, vocab_start: int, vocab_shard: int) -> StopMask | None:
        entries = [
            (row, self.processed[row], token_id - vocab_start, settings.min_tokens)
            for row, settings in enumerate(self._settings)
            if settings.masks_stops
            for token_id in settings.stop_token_ids
            if 0 <= token_id - vocab_start < vocab_shard
        ]
        if not entries:
            return None
        rows, batch_rows, columns, min_tokens = (self.values(part, torch.int64) for part in zip(*entries, strict=True))
        return StopMask(rows=rows, batch_rows=batch_rows, columns=columns, min_tokens=min_tokens)

    def logprobs(self) -> LogprobRows | None:
        rows = tuple(row for row, settings in enumerate(self._batch) if settings.logprobs >= 0)
        if not rows:
            return None
        return LogprobRows(
            rows=self.values(rows, torch.int64),
            batch_rows=rows,
            counts=tuple(self._batch[row].logprobs for row in rows),
        )

    def _log_min_p(self, settings: Sequence[SlotSettings]) -> torch.Tensor:
        return self.column([row.log_min_p for row in settings], torch.float64)

"""Executes plans: builds each step's batch, runs the model and the sampler, moves the slots on.

Between the steps of a plan, and between plans, nothing on the host waits for the device: the sampled
tokens and everything that follows from them stay there, and what the host needs to know (lengths, for
sizes) it knows as upper bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.models.batch import ForwardBatch
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.rank.kv_cache import KvCache
from tpmodel_worker.rank.plan_check import PlanLimits, check_plan
from tpmodel_worker.rank.replies import StepLogprobs, StepOutcome
from tpmodel_worker.rank.sampling import Sampler
from tpmodel_worker.rank.slots import Phase, SlotTable
from tpmodel_worker.rank.upload import HostCopy, upload

_LENGTH = int(pb.FINISHED_LENGTH)
_STOP = int(pb.FINISHED_STOP)


@dataclass(frozen=True, slots=True)
class _DecodeRows:
    """The decoding slots of a plan. D rows."""

    slots: np.ndarray
    """(D,) int64."""
    index: torch.Tensor
    """(D,) int64, slots on the device."""
    scratch: torch.Tensor
    """(D,) int64, rows of the scratch block, for slots that idle."""


@dataclass(frozen=True, slots=True)
class _ChunkRows:
    """The prefill chunks of a step. C chunks of P tokens together."""

    slots: np.ndarray
    """(C,) int64."""
    index: torch.Tensor
    """(C,) int64."""
    lengths: tuple[int, ...]
    ends: np.ndarray
    """(C,) int64, computed length afterwards."""
    end_tensor: torch.Tensor
    """(C,) int64, ends on the device."""
    token_ids: torch.Tensor
    """(P,) int64."""
    positions: torch.Tensor
    """(P,) int64."""
    kv_rows: torch.Tensor
    """(P,) int64."""
    completing: np.ndarray
    """Indices into the chunks that reach the last known token, and so sample."""


class StepRunner:
    """Slots, cache, model and sampler of one epoch."""

    def __init__(
        self,
        *,
        model: CausalLanguageModel,
        cache: KvCache,
        slots: SlotTable,
        sampler: Sampler,
        limits: PlanLimits,
        device: torch.device,
    ) -> None:
        self.slots = slots
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._limits = limits
        self._device = device
        self._block_size = limits.slots.block_size
        self._scratch_start = limits.slots.num_blocks * self._block_size
        self._arange = torch.arange(max(limits.max_step_tokens, limits.slots.max_slots) + 1, device=device)
        self._arange32 = self._arange.to(torch.int32)
        self._decode_rows: _DecodeRows | None = None

    def execute(
        self,
        seq: int,
        plan: pb.GenerateStepRequest,
        *,
        submit: Callable[[StepOutcome], None],
        check: Callable[[], None],
    ) -> None:
        """Applies a plan and launches its steps; every step's outcome goes to submit.

        check is called before each step and raises when the epoch has ended.

        Raises:
            InvalidPlanError: the plan cannot be; nothing was touched.
            CommunicatorError, EpochEndedError, RuntimeError: it failed on the way.
        """
        check_plan(plan, self.slots.host, self._limits)
        self._apply(plan)
        if plan.steps == 0:
            now = time.perf_counter()
            submit(StepOutcome(seq=seq, step=0, last=True, ack_now=plan.ack_now, started=now))
            return
        decodes = self._decode(plan.decode_slots)
        chunks = self._chunks(plan.prefill_chunks)
        for step in range(plan.steps):
            check()
            started = time.perf_counter()
            slots, sampled, logprobs = self._step(decodes, chunks)
            submit(
                StepOutcome(
                    seq=seq,
                    step=step,
                    last=step == plan.steps - 1,
                    ack_now=plan.ack_now,
                    started=started,
                    slots=slots,
                    sampled=sampled,
                    logprobs=logprobs,
                )
            )

    def _apply(self, plan: pb.GenerateStepRequest) -> None:
        self.slots.release(plan.releases)
        for slot in plan.releases:
            self._sampler.release(slot)
        self.slots.admit(plan.admissions)
        for admission in plan.admissions:
            prompt, outputs = np.split(self.slots.host.tokens[admission.slot], [admission.prompt_length])
            self._sampler.admit(admission.slot, admission.sampling, prompt.tolist(), outputs.tolist())
        self.slots.extend(plan.block_table_deltas)
        if plan.block_copies:
            # One by one where a block is both written and read: copies apply in order.
            for copies in _independent(plan.block_copies):
                pairs = np.array([(copy.source, copy.target) for copy in copies], dtype=np.int64)
                self._cache.copy_blocks(*upload([pairs[:, 0], pairs[:, 1]], self._device))

    def _decode(self, decode_slots: Sequence[int]) -> _DecodeRows | None:
        if not decode_slots:
            return None
        slots = np.array(decode_slots, dtype=np.int64)
        rows = self._decode_rows
        if rows is None or not np.array_equal(rows.slots, slots):
            scratch = self._scratch_start + np.arange(len(slots), dtype=np.int64) % self._block_size
            index, scratch_rows = upload([slots, scratch], self._device)
            rows = self._decode_rows = _DecodeRows(slots=slots, index=index, scratch=scratch_rows)
        return rows

    def _chunks(self, prefill_chunks: Sequence[pb.PrefillChunk]) -> _ChunkRows | None:
        if not prefill_chunks:
            return None
        host = self.slots.host
        slots = np.array([chunk.slot for chunk in prefill_chunks], dtype=np.int64)
        lengths = [chunk.length for chunk in prefill_chunks]
        starts = host.computed[slots]
        ends = starts + lengths
        tokens: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        kv_rows: list[np.ndarray] = []
        for slot, start, end in zip(slots.tolist(), starts.tolist(), ends.tolist(), strict=True):
            span = np.arange(start, end, dtype=np.int64)
            blocks = host.block_tables[slot, span // self._block_size].astype(np.int64)
            tokens.append(host.tokens[slot][start:end])
            positions.append(span)
            kv_rows.append(blocks * self._block_size + span % self._block_size)
        arrays = [slots, ends, np.concatenate(tokens), np.concatenate(positions), np.concatenate(kv_rows)]
        index, end_tensor, token_ids, position_ids, rows = upload(arrays, self._device)
        return _ChunkRows(
            slots=slots,
            index=index,
            lengths=tuple(lengths),
            ends=ends,
            end_tensor=end_tensor,
            token_ids=token_ids,
            positions=position_ids,
            kv_rows=rows,
            completing=np.flatnonzero(ends == host.known[slots]),
        )

    def _step(
        self, decodes: _DecodeRows | None, chunks: _ChunkRows | None
    ) -> tuple[np.ndarray, HostCopy | None, StepLogprobs | None]:
        """One step: the slots that it samples for, and their tokens on the way to the host."""
        table = self.slots
        active = None if decodes is None else table.finished.index_select(0, decodes.index).logical_not_()
        batch = self._batch(decodes, active, chunks)
        logits = self._model.forward(batch, self._cache.layers)
        self._advance(decodes, active, chunks)
        slots, index = _sampling_rows(decodes, chunks)
        if len(slots) == 0:
            return slots, None, None
        if active is None:
            active = torch.ones(len(slots), dtype=torch.bool, device=self._device)
        elif len(slots) > len(active):
            active = torch.nn.functional.pad(active, (0, len(slots) - len(active)), value=True)
        counts = table.output_counts.index_select(0, index)
        sampled = self._sampler.sample(logits, slots=slots.tolist(), output_counts=counts, active=active)
        packed = self._commit(index, sampled.token_ids, counts, active)
        logprobs = None if sampled.logprobs is None else StepLogprobs.of(sampled.logprobs)
        return slots, HostCopy(packed), logprobs

    def _batch(
        self, decodes: _DecodeRows | None, active: torch.Tensor | None, chunks: _ChunkRows | None
    ) -> ForwardBatch:
        host = self.slots.host
        decode_count = 0
        most = 0
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if decodes is not None and active is not None:
            decode_count = len(decodes.slots)
            most = int(np.minimum(host.computed[decodes.slots] + 1, host.most_computed[decodes.slots]).max())
            positions = self.slots.computed.index_select(0, decodes.index)
            lengths = (positions + active).to(torch.int32)
            tokens = self.slots.last_token.index_select(0, decodes.index)
            parts.append((decodes.index, tokens, positions, positions, lengths))
        if chunks is not None:
            most = max(most, int(chunks.ends.max()))
            lengths = chunks.end_tensor.to(torch.int32)
            parts.append((chunks.index, chunks.token_ids, chunks.positions, chunks.kv_rows, lengths))
        columns = -(-most // self._block_size)
        index, token_ids, positions, kv_rows, kv_lengths = (
            parts[0] if len(parts) == 1 else (torch.cat(pair) for pair in zip(*parts, strict=True))
        )
        block_tables = self.slots.block_tables[:, :columns].index_select(0, index)
        if decodes is not None and active is not None:
            own = positions[:decode_count]
            blocks = block_tables[:decode_count].gather(1, (own // self._block_size).unsqueeze(1)).squeeze(1)
            rows = torch.where(active, blocks * self._block_size + own % self._block_size, decodes.scratch)
            kv_rows = rows if chunks is None else torch.cat((rows, chunks.kv_rows))
        query_lengths = (1,) * decode_count + (() if chunks is None else chunks.lengths)
        query_starts, sample_rows = self._query_rows(decode_count, chunks)
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            kv_rows=kv_rows,
            block_tables=block_tables,
            kv_lengths=kv_lengths,
            query_starts=query_starts,
            sample_rows=sample_rows,
            decodes=decode_count,
            query_lengths=query_lengths,
            max_kv_length=most,
        )

    def _query_rows(self, decode_count: int, chunks: _ChunkRows | None) -> tuple[torch.Tensor, torch.Tensor]:
        if chunks is None:
            return self._arange32[: decode_count + 1], self._arange[:decode_count]
        starts = np.cumsum((decode_count, *chunks.lengths), dtype=np.int64)
        last_rows = starts[1:][chunks.completing] - 1
        starts_tensor, last_tensor = upload([starts, last_rows], self._device)
        query_starts = torch.cat((self._arange32[:decode_count], starts_tensor.to(torch.int32)))
        return query_starts, torch.cat((self._arange[:decode_count], last_tensor))

    def _advance(self, decodes: _DecodeRows | None, active: torch.Tensor | None, chunks: _ChunkRows | None) -> None:
        """Moves the computed lengths on, here and on the device."""
        host, table = self.slots.host, self.slots
        if decodes is not None and active is not None:
            table.computed.index_add_(0, decodes.index, active.to(torch.int64))
            host.computed[decodes.slots] = np.minimum(
                host.computed[decodes.slots] + 1, host.most_computed[decodes.slots]
            )
        if chunks is not None:
            table.computed.index_copy_(0, chunks.index, chunks.end_tensor)
            host.computed[chunks.slots] = chunks.ends
            host.phase[chunks.slots[chunks.completing]] = Phase.DECODE

    def _commit(
        self, index: torch.Tensor, token_ids: torch.Tensor, counts: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        """Moves the sampled slots on and decides on the device which have finished; (3, R) for the host."""
        table = self.slots
        counts = counts + active
        stops = (table.stop_ids.index_select(0, index) == token_ids.unsqueeze(1)).any(1)
        spent = counts >= table.max_tokens.index_select(0, index)
        finished = torch.where(stops, _STOP, spent * _LENGTH)
        table.output_counts.index_copy_(0, index, counts)
        table.last_token.index_copy_(0, index, token_ids)
        # A slot that idles has finished before, and stays so.
        table.finished.index_copy_(0, index, finished.bool().logical_or_(active.logical_not()))
        return torch.stack((token_ids, finished, active.to(torch.int64)))


def _sampling_rows(decodes: _DecodeRows | None, chunks: _ChunkRows | None) -> tuple[np.ndarray, torch.Tensor]:
    """The slots that sample in this step, in the order of the batch, on the host and on the device."""
    if chunks is None:
        assert decodes is not None
        return decodes.slots, decodes.index
    if len(chunks.completing) == len(chunks.slots):
        slots, index = chunks.slots, chunks.index
    else:
        slots = chunks.slots[chunks.completing]
        (index,) = upload([slots], chunks.index.device)
    if decodes is None:
        return slots, index
    return np.concatenate((decodes.slots, slots)), torch.cat((decodes.index, index))


def _independent(copies: Sequence[pb.BlockCopy]) -> list[list[pb.BlockCopy]]:
    """Groups of copies, in order, in none of which a block is written that the group reads or writes before."""
    groups: list[list[pb.BlockCopy]] = []
    written: set[int] = set()
    for copy in copies:
        if not groups or copy.source in written or copy.target in written:
            groups.append([])
            written = set()
        groups[-1].append(copy)
        written.add(copy.target)
    return groups

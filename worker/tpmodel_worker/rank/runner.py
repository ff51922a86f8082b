"""Executes plans: applies them to the slots, runs model and sampler step by step, moves the slots on.

Between the steps of a plan, and between plans, nothing on the host waits for the device: the sampled
tokens and everything that follows from them stay there, and what the host needs to know (lengths, for
sizes) it knows as upper bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.rank.kv_cache import KvCache
from tpmodel_worker.rank.plan_check import PlanLimits, check_plan
from tpmodel_worker.rank.replies import StepLogprobs, StepOutcome
from tpmodel_worker.rank.sampling import Sampler
from tpmodel_worker.rank.slots import Phase, SlotTable
from tpmodel_worker.rank.step_batch import ChunkRows, DecodeRows, StepBatchBuilder, sampling_slots
from tpmodel_worker.rank.upload import HostCopy, upload

_STOP = int(pb.FINISHED_STOP)
_LENGTH = int(pb.FINISHED_LENGTH)


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
        self._batches = StepBatchBuilder(slots, limits, device)

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
        decodes = self._batches.decodes(plan.decode_slots)
        chunks = self._batches.chunks(plan.prefill_chunks)
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
        if plan.state_saves:
            self._save_states(plan.state_saves)

    def _apply(self, plan: pb.GenerateStepRequest) -> None:
        self.slots.release(plan.releases)
        for slot in plan.releases:
            self._sampler.release(slot)
        self.slots.admit(plan.admissions)
        for admission in plan.admissions:
            known = self.slots.host.tokens[admission.slot].tolist()
            prompt, outputs = known[: admission.prompt_length], known[admission.prompt_length :]
            self._sampler.admit(admission.slot, admission.sampling, prompt, outputs)
        self._begin_states(plan.admissions)
        self.slots.extend(plan.block_table_deltas)
        for copies in _independent(plan.block_copies):
            pairs = np.array([(copy.source, copy.target) for copy in copies], dtype=np.int64)
            self._cache.copy_blocks(*upload([pairs[:, 0], pairs[:, 1]], self._device))

    def _begin_states(self, admissions: Sequence[pb.Admission]) -> None:
        """Recurrent states of new sequences: empty, or a snapshot's, unless they are there already."""
        restored = [admission for admission in admissions if admission.HasField("state_snapshot")]
        if restored:
            snapshots = [admission.state_snapshot for admission in restored]
            self._cache.restore_states(snapshots, [admission.slot for admission in restored])
        begun = [
            admission.slot
            for admission in admissions
            if not admission.state_received and not admission.HasField("state_snapshot")
        ]
        self._cache.reset_states(begun)

    def _save_states(self, saves: Sequence[pb.StateSave]) -> None:
        self._cache.save_states([save.slot for save in saves], [save.snapshot for save in saves])
        self.slots.note_saves(saves)

    def _step(
        self, decodes: DecodeRows | None, chunks: ChunkRows | None
    ) -> tuple[np.ndarray, HostCopy | None, StepLogprobs | None]:
        """One step: the slots that it samples for, and what it sampled on its way to the host."""
        active = None
        if decodes is not None:
            active = self.slots.finished.index_select(0, decodes.index).logical_not_()
        batch = self._batches.build(decodes, active, chunks)
        logits = self._model.forward(batch, self._cache.layers)
        self._advance(decodes, active, chunks)
        slots, index = sampling_slots(decodes, chunks)
        if len(slots) == 0:
            return slots, None, None
        if active is None:
            active = torch.ones(len(slots), dtype=torch.bool, device=self._device)
        elif len(slots) > len(active):
            active = torch.nn.functional.pad(active, (0, len(slots) - len(active)), value=True)
        counts = self.slots.output_counts.index_select(0, index)
        sampled = self._sampler.sample(logits, slots=slots.tolist(), output_counts=counts, active=active)
        outcome = self._commit(index, sampled.token_ids, counts, active)
        logprobs = None if sampled.logprobs is None else StepLogprobs.of(sampled.logprobs)
        return slots, HostCopy(outcome), logprobs

    def _advance(self, decodes: DecodeRows | None, active: torch.Tensor | None, chunks: ChunkRows | None) -> None:
        """Moves the computed lengths on, on the host and on the device."""
        host, table = self.slots.host, self.slots
        if decodes is not None and active is not None:
            table.computed.index_add_(0, decodes.index, active.to(torch.int64))
            most = host.most_computed[decodes.slots]
            host.computed[decodes.slots] = np.minimum(host.computed[decodes.slots] + 1, most)
        if chunks is not None:
            table.computed.index_copy_(0, chunks.index, chunks.end_tensor)
            host.computed[chunks.slots] = chunks.ends
            host.phase[chunks.slots[chunks.completing]] = Phase.DECODE

    def _commit(
        self, index: torch.Tensor, token_ids: torch.Tensor, counts: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        """Moves the sampled slots on and decides on the device which have finished.

        Returns (3, R) int64: token ids, Finished values, and 1 for slots that sampled and 0 for those that idled.
        """
        table = self.slots
        counts = counts + active
        stopped = (table.stop_ids.index_select(0, index) == token_ids.unsqueeze(1)).any(1)
        spent = counts >= table.max_tokens.index_select(0, index)
        finished = torch.where(stopped, _STOP, spent * _LENGTH)
        table.output_counts.index_copy_(0, index, counts)
        table.last_token.index_copy_(0, index, token_ids)
        # A slot that idles has finished before, and stays so.
        table.finished.index_copy_(0, index, finished.bool().logical_or_(active.logical_not()))
        return torch.stack((token_ids, finished, active.to(torch.int64)))


def _independent(copies: Sequence[pb.BlockCopy]) -> list[list[pb.BlockCopy]]:
    """Groups of copies, in order: no group reads or writes a block that it has written before."""
    groups: list[list[pb.BlockCopy]] = []
    written: set[int] = set()
    for copy in copies:
        if not groups or copy.source in written or copy.target in written:
            groups.append([])
            written = set()
        groups[-1].append(copy)
        written.add(copy.target)
    return groups

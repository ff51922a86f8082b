"""Refuses a plan that cannot be, from its content and the plans before it alone: so all ranks refuse it alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.errors import InvalidPlanError
from tpmodel_worker.rank.slot_settings import SlotSettings
from tpmodel_worker.rank.slots import HostSlots, Phase, SlotLimits, tokens_digest

MAX_STEPS = 8


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What bounds a plan besides the slots' own limits."""

    slots: SlotLimits
    vocab_size: int
    max_step_tokens: int
    keeps_state: bool = False
    """Whether layers keep a state, which blocks of KV do not hold: sequences then begin at their first token, or with a
    snapshot of the state."""


@dataclass(frozen=True, slots=True)
class _Outlook:
    """The slots as they will be when the plan's steps begin."""

    phase: np.ndarray
    computed: np.ndarray
    known: np.ndarray
    most_computed: np.ndarray
    block_counts: np.ndarray

    @classmethod
    def of(cls, host: HostSlots, *, copy: bool) -> Self:
        """The slots as they are, to be changed if copy is set."""
        arrays = (host.phase, host.computed, host.known, host.most_computed, host.block_counts)
        return cls(*(array.copy() for array in arrays)) if copy else cls(*arrays)


def check_plan(plan: pb.GenerateStepRequest, host: HostSlots, limits: PlanLimits) -> None:
    """Returns if the plan can be applied and executed as it stands.

    Raises:
        InvalidPlanError: it cannot; names the slot, block or number.
    """
    changes = bool(plan.releases or plan.admissions or plan.block_table_deltas)
    outlook = _Outlook.of(host, copy=changes)
    if changes:
        _check_releases(plan, outlook, limits.slots)
        _check_admissions(plan, outlook, limits)
        _check_restores(plan, host, limits)
        _check_deltas(plan, outlook, limits.slots)
    _check_copies(plan, limits.slots)
    _check_steps(plan, limits)
    _check_decodes(plan, outlook, limits.slots)
    _check_chunks(plan, outlook, limits.slots)
    _check_saves(plan, limits.slots)


def _check_slot(slot: int, limits: SlotLimits) -> None:
    if slot >= limits.max_slots:
        raise InvalidPlanError(f"slot {slot} is out of range: there are {limits.max_slots}")


def _check_block(block: int, limits: SlotLimits) -> None:
    if block >= limits.num_blocks:
        raise InvalidPlanError(f"block {block} is out of range: there are {limits.num_blocks}")


def _check_releases(plan: pb.GenerateStepRequest, outlook: _Outlook, limits: SlotLimits) -> None:
    for slot in plan.releases:
        _check_slot(slot, limits)
        if outlook.phase[slot] == Phase.FREE:
            raise InvalidPlanError(f"slot {slot} is released but holds no sequence")
        outlook.phase[slot] = Phase.FREE
        outlook.block_counts[slot] = 0


def _check_admissions(plan: pb.GenerateStepRequest, outlook: _Outlook, limits: PlanLimits) -> None:
    for admission in plan.admissions:
        slot, known = admission.slot, len(admission.token_ids)
        max_tokens = admission.sampling.max_tokens
        _check_slot(slot, limits.slots)
        if outlook.phase[slot] != Phase.FREE:
            raise InvalidPlanError(f"slot {slot} is admitted to but holds a sequence")
        if not 1 <= admission.prompt_length <= known:
            raise InvalidPlanError(
                f"slot {slot}: prompt_length {admission.prompt_length} is not in 1 to {known}, its number of token ids"
            )
        begins_later = admission.state_received or admission.HasField("state_snapshot")
        if admission.computed_length and limits.keeps_state and not begins_later:
            raise InvalidPlanError(
                f"slot {slot}: computed_length {admission.computed_length}, but the model's recurrent state "
                "begins at token 0"
            )
        if admission.computed_length >= known:
            raise InvalidPlanError(
                f"slot {slot}: computed_length {admission.computed_length} leaves none of {known} tokens to compute"
            )
        if known - admission.prompt_length >= max_tokens:
            raise InvalidPlanError(
                f"slot {slot}: {known - admission.prompt_length} outputs are known, max_tokens is {max_tokens}"
            )
        if known > limits.slots.max_blocks * limits.slots.block_size:
            raise InvalidPlanError(f"slot {slot}: {known} tokens exceed the longest sequence")
        largest = max(admission.token_ids)
        if largest >= limits.vocab_size:
            raise InvalidPlanError(
                f"slot {slot}: token id {largest} is out of range: the vocabulary has {limits.vocab_size}"
            )
        try:
            SlotSettings.from_message(admission.sampling, limits.vocab_size)
        except ValueError as error:
            raise InvalidPlanError(f"slot {slot}: {error}") from error
        outlook.phase[slot] = Phase.PREFILL
        outlook.known[slot] = known
        outlook.computed[slot] = admission.computed_length
        outlook.most_computed[slot] = admission.prompt_length + max_tokens - 1
        outlook.block_counts[slot] = 0


def _check_restores(plan: pb.GenerateStepRequest, host: HostSlots, limits: PlanLimits) -> None:
    for admission in plan.admissions:
        if not admission.HasField("state_snapshot"):
            continue
        slot, snapshot, length = admission.slot, admission.state_snapshot, admission.computed_length
        _check_snapshot(snapshot, limits.slots)
        if admission.state_received:
            raise InvalidPlanError(f"slot {slot}: its state was received, and is to be restored from a snapshot")
        if host.snapshots[snapshot] != tokens_digest(np.array(admission.token_ids[:length], dtype=np.int64)):
            raise InvalidPlanError(
                f"slot {slot}: snapshot {snapshot} was not made behind the sequence's first {length} tokens"
            )


def _check_saves(plan: pb.GenerateStepRequest, limits: SlotLimits) -> None:
    computing = {chunk.slot for chunk in plan.prefill_chunks}
    seen: set[int] = set()
    for save in plan.state_saves:
        _check_snapshot(save.snapshot, limits)
        if save.slot not in computing:
            raise InvalidPlanError(f"slot {save.slot} has no prefill chunk, and its state is to be copied")
        if save.snapshot in seen:
            raise InvalidPlanError(f"snapshot {save.snapshot} is made twice")
        seen.add(save.snapshot)


def _check_snapshot(snapshot: int, limits: SlotLimits) -> None:
    if snapshot >= limits.snapshots:
        raise InvalidPlanError(f"snapshot {snapshot} is out of range: there are {limits.snapshots}")


def _check_deltas(plan: pb.GenerateStepRequest, outlook: _Outlook, limits: SlotLimits) -> None:
    for delta in plan.block_table_deltas:
        slot, end = delta.slot, delta.start + len(delta.blocks)
        _check_slot(slot, limits)
        if outlook.phase[slot] == Phase.FREE:
            raise InvalidPlanError(f"slot {slot} gets blocks but holds no sequence")
        if delta.start > outlook.block_counts[slot]:
            raise InvalidPlanError(
                f"slot {slot}: blocks from index {delta.start} on leave a hole after {outlook.block_counts[slot]}"
            )
        if end > limits.max_blocks:
            raise InvalidPlanError(f"slot {slot}: {end} blocks exceed the longest sequence's {limits.max_blocks}")
        for block in delta.blocks:
            _check_block(block, limits)
        outlook.block_counts[slot] = max(int(outlook.block_counts[slot]), end)


def _check_copies(plan: pb.GenerateStepRequest, limits: SlotLimits) -> None:
    for copy in plan.block_copies:
        _check_block(copy.source, limits)
        _check_block(copy.target, limits)
        if copy.source == copy.target:
            raise InvalidPlanError(f"block {copy.source} is copied onto itself")


def _check_steps(plan: pb.GenerateStepRequest, limits: PlanLimits) -> None:
    if plan.steps > MAX_STEPS:
        raise InvalidPlanError(f"{plan.steps} steps in one plan: at most {MAX_STEPS}")
    if plan.prefill_chunks and plan.steps != 1:
        raise InvalidPlanError(f"prefill chunks in a plan of {plan.steps} steps: they need exactly 1")
    if bool(plan.decode_slots or plan.prefill_chunks) != bool(plan.steps):
        raise InvalidPlanError(f"a plan of {plan.steps} steps with {len(plan.decode_slots)} slots to decode")
    tokens = len(plan.decode_slots) + sum(chunk.length for chunk in plan.prefill_chunks)
    if tokens > limits.max_step_tokens:
        raise InvalidPlanError(f"{tokens} tokens in one step: at most {limits.max_step_tokens}")


def _check_decodes(plan: pb.GenerateStepRequest, outlook: _Outlook, limits: SlotLimits) -> None:
    if not plan.decode_slots:
        return
    slots = np.array(plan.decode_slots, dtype=np.int64)
    if (slots[1:] <= slots[:-1]).any():
        raise InvalidPlanError("decode_slots are not ascending")
    _check_slot(int(slots[-1]), limits)
    idle = outlook.phase[slots] != Phase.DECODE
    if idle.any():
        raise InvalidPlanError(f"slot {slots[idle][0]} cannot decode: it has not sampled yet, or holds no sequence")
    lengths = np.minimum(outlook.computed[slots] + plan.steps, outlook.most_computed[slots])
    short = lengths > outlook.block_counts[slots] * limits.block_size
    if short.any():
        _refuse_for_blocks(int(slots[short][0]), int(lengths[short][0]), outlook)


def _check_chunks(plan: pb.GenerateStepRequest, outlook: _Outlook, limits: SlotLimits) -> None:
    seen: set[int] = set()
    for chunk in plan.prefill_chunks:
        slot = chunk.slot
        _check_slot(slot, limits)
        if slot in seen:
            raise InvalidPlanError(f"slot {slot} has two prefill chunks")
        seen.add(slot)
        if outlook.phase[slot] != Phase.PREFILL:
            raise InvalidPlanError(f"slot {slot} has no known tokens left to compute")
        end = int(outlook.computed[slot]) + chunk.length
        if chunk.length < 1 or end > outlook.known[slot]:
            raise InvalidPlanError(
                f"slot {slot}: a chunk of {chunk.length} after {outlook.computed[slot]} computed tokens "
                f"does not fit {outlook.known[slot]} known ones"
            )
        if end > outlook.block_counts[slot] * limits.block_size:
            _refuse_for_blocks(slot, end, outlook)


def _refuse_for_blocks(slot: int, length: int, outlook: _Outlook) -> None:
    raise InvalidPlanError(f"slot {slot} has no block for {length} tokens: it holds {outlook.block_counts[slot]}")

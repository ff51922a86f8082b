"""Sampling over vocabulary shards: the same tokens on every rank, at any world size and in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpmodel.v1 import worker_pb2
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.gumbel_noise import NoiseKeys, gumbel_noise
from tpmodel_worker.rank.logprobs import SampledLogprobs, token_logprobs
from tpmodel_worker.rank.penalties import PenaltyCounts
from tpmodel_worker.rank.sampling_plan import SampledRows, SamplingPlan, plan_sampling
from tpmodel_worker.rank.slot_settings import SlotSettings
from tpmodel_worker.rank.token_keys import best_keys, key_ids, row_blocks
from tpmodel_worker.rank.truncation import sample_candidates, truncate


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One step's tokens, on the device, the same on every rank."""

    token_ids: torch.Tensor
    """(R,) int64."""
    logprobs: SampledLogprobs | None
    """None where no row asks."""


class Sampler:
    """Turns logits into tokens for the slots of one rank.

    A token is the arg-max of its row's scores: logits after penalties, min_tokens' mask, temperature, top_k,
    top_p and min_p, in this order, plus Gumbel noise, which makes the arg-max a draw from their softmax. A
    temperature of 0 adds no noise and skips temperature and limits. Equal scores: the lower id.

    Which of this a batch takes is decided from settings that the host knows: nothing waits for the device, and
    a batch of greedy rows costs one local arg-max and one gather of a key for each row.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        vocab_size: int,
        vocab_start: int,
        vocab_shard: int,
        max_slots: int,
        device: torch.device,
    ) -> None:
        """The shard has columns for ids vocab_start on, equally many on each rank, in the order of ranks.

        Logits of columns from vocab_size on, which pad the last shards, must be -inf.
        """
        self._communicator = communicator
        self._vocab_size = vocab_size
        self._vocab_start = vocab_start
        self._vocab_shard = vocab_shard
        self._max_slots = max_slots
        self._device = device
        self._settings: dict[int, SlotSettings] = {}
        self._counts = PenaltyCounts(vocab_start=vocab_start, vocab_shard=vocab_shard, device=device)
        self._planned: tuple[tuple[int, ...], SamplingPlan] | None = None

    def admit(
        self,
        slot: int,
        sampling: worker_pb2.SlotSampling,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
    ) -> None:
        """Gives a slot its settings and what is known of its sequence; replaces what the slot held.

        Admitting a sequence again with its outputs so far continues it exactly.

        Raises:
            ValueError: no such slot, or a setting is out of its range; nothing has changed.
        """
        if not 0 <= slot < self._max_slots:
            raise ValueError(f"slot {slot} does not exist: expected 0 to {self._max_slots - 1}")
        settings = SlotSettings.from_message(sampling, self._vocab_size)
        self._planned = None
        self._settings[slot] = settings
        if settings.penalised:
            self._counts.admit(slot, prompt_ids, output_ids)
        else:
            self._counts.release(slot)

    def release(self, slot: int) -> None:
        """Forgets a slot; one that holds nothing is ignored."""
        self._planned = None
        self._settings.pop(slot, None)
        self._counts.release(slot)

    def reset(self) -> None:
        """Forgets all slots."""
        for slot in list(self._settings):
            self.release(slot)

    def sample(
        self, logits: torch.Tensor, *, slots: Sequence[int], output_counts: torch.Tensor, active: torch.Tensor
    ) -> SampledTokens:
        """Samples one token for each row. All ranks call it with the same rows.

        Args:
            logits: (R, vocab_shard) float32, this rank's; not changed.
            slots: R admitted slots, each once.
            output_counts: (R,) integer, on the device: output tokens so far, which is the position that keys
                the noise.
            active: (R,) bool, on the device. An inactive row gets some token, which is not counted.

        Raises:
            ValueError: a slot was not admitted, or the logits have another shape.
        """
        if logits.shape != (len(slots), self._vocab_shard):
            raise ValueError(f"logits have shape {tuple(logits.shape)}, expected {(len(slots), self._vocab_shard)}")
        plan = self._plan(tuple(slots))
        if plan.processed is None:
            token_ids = self._arg_max(best_keys(logits, self._vocab_start))
        else:
            token_ids = self._sample_processed(logits, plan, plan.processed, output_counts)
        if plan.penalties is not None:
            self._counts.count(token_ids, active, plan.penalties)
        logprobs = None
        if plan.logprobs is not None:
            logprobs = token_logprobs(logits, token_ids, plan.logprobs, self._vocab_start, self._communicator)
        return SampledTokens(token_ids, logprobs)

    def _plan(self, slots: tuple[int, ...]) -> SamplingPlan:
        """The batch's plan. Batches stay the same over many steps, so the last one is kept."""
        if self._planned is None or self._planned[0] != slots:
            missing = [slot for slot in slots if slot not in self._settings]
            if missing:
                raise ValueError(f"slots {missing} were not admitted")
            plan = plan_sampling(
                [self._settings[slot] for slot in slots],
                slots,
                self._counts.stored_row,
                vocab_start=self._vocab_start,
                vocab_shard=self._vocab_shard,
                device=self._device,
            )
            self._planned = (slots, plan)
        return self._planned[1]

    def _arg_max(self, keys: torch.Tensor) -> torch.Tensor:
        """(R,) int64 token ids, from this rank's best key of each row."""
        return key_ids(self._communicator.all_gather(keys).amax(dim=0))

    def _sample_processed(
        self, logits: torch.Tensor, plan: SamplingPlan, processed: torch.Tensor, output_counts: torch.Tensor
    ) -> torch.Tensor:
        """(R,) int64 token ids of a batch that has more than plain rows."""
        scores = logits.index_select(0, processed)
        if plan.penalties is not None:
            self._counts.apply(scores, plan.penalties)
        if plan.stops is not None:
            plan.stops.apply(scores, output_counts)
        if plan.sampled is not None:
            scores[plan.sampled.rows] /= plan.sampled.temperatures
        for limits in plan.sharded_limits:
            truncate(scores, limits, self._communicator)

        token_ids = torch.zeros(logits.shape[0], dtype=torch.int64, device=self._device)
        if plan.needs_arg_max:
            keys = best_keys(logits, self._vocab_start) if plan.has_plain_rows else token_ids.clone()
            rows = plan.arg_max_rows
            if plan.sampled is not None:
                self._add_noise(scores[rows], plan.sampled, output_counts)
            keys.index_copy_(0, processed[rows], best_keys(scores[rows], self._vocab_start))
            token_ids = self._arg_max(keys)
        if plan.candidates is not None and plan.sampled is not None:
            rows = plan.candidates.rows
            noise_keys = _noise_keys(plan.sampled, rows, output_counts)
            candidates = sample_candidates(scores, plan.candidates, noise_keys, self._vocab_start, self._communicator)
            token_ids.index_copy_(0, processed[rows], candidates)
        return token_ids

    def _add_noise(self, scores: torch.Tensor, sampled: SampledRows, output_counts: torch.Tensor) -> None:
        """Adds the noise of this rank's shard to the sampled ones of the arg-max rows (A, vocab_shard), in place."""
        noise_keys = _noise_keys(sampled, slice(sampled.rows.start, scores.shape[0]), output_counts)
        scores = scores[sampled.rows.start :]
        for block in row_blocks(scores.shape[0], self._vocab_shard, self._device):
            scores[block] += gumbel_noise(noise_keys.block(block), self._vocab_start, self._vocab_shard)


def _noise_keys(sampled: SampledRows, rows: slice, output_counts: torch.Tensor) -> NoiseKeys:
    """The keys of some rows of the scores, all of them sampled ones."""
    part = slice(rows.start - sampled.rows.start, rows.stop - sampled.rows.start)
    positions = output_counts.index_select(0, sampled.batch_rows[part]).to(torch.int64)
    return NoiseKeys(sampled.seeds[part], sampled.sample_indices[part], positions)

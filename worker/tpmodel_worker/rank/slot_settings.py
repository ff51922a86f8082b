"""Sampling settings of one slot, checked and classified once, at admission."""

from __future__ import annotations

import enum
import math
import sys
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2
from tpmodel_worker.rank.logprobs import MAX_LOGPROBS

MAX_CANDIDATES = 1024
"""The largest top_k whose candidates are gathered; beyond it rows stay sharded."""
_MIN_TEMPERATURE = 1e-6
"""Lower temperatures are taken as this one: logits divided by it stay finite in float32."""


class RowKind(enum.IntEnum):
    """How a row becomes a token. Batches sort rows by it, so that each treatment covers one slice."""

    GREEDY = 0
    UNTRUNCATED = 1
    MIN_P = 2
    TOP_P = 3
    TOP_K_TOP_P = 4
    TOP_K = 5
    CANDIDATES = 6


@dataclass(frozen=True, slots=True)
class SlotSettings:
    """One slot's sampling as the rank computes it; fields as in worker.proto's SlotSampling."""

    kind: RowKind
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    """As a signed 64-bit number of the same bits."""
    sample_index: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    logprobs: int
    """-1: none."""

    @property
    def penalised(self) -> bool:
        """Whether scores depend on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def masks_stops(self) -> bool:
        """Whether stop ids are masked at first."""
        return self.min_tokens > 0 and bool(self.stop_token_ids)

    @property
    def plain(self) -> bool:
        """Whether the token is simply the arg-max of the model's logits."""
        return self.kind is RowKind.GREEDY and not self.penalised and not self.masks_stops

    @property
    def log_min_p(self) -> float:
        """The logarithm of min_p; -inf where it is off."""
        return math.log(self.min_p) if self.min_p > 0 else -math.inf

    @classmethod
    def from_message(cls, sampling: worker_pb2.SlotSampling, vocab_size: int) -> SlotSettings:
        """Checks and classifies.

        Raises:
            ValueError: a value is out of its range; names field and value.
        """
        _check(sampling)
        top_k = sampling.top_k if 0 < sampling.top_k < vocab_size else 0
        return cls(
            kind=_kind(sampling, top_k),
            temperature=max(sampling.temperature, _MIN_TEMPERATURE),
            top_k=top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed - (1 << 64) if sampling.seed >= 1 << 63 else sampling.seed,
            sample_index=sampling.sample_index,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            min_tokens=sampling.min_tokens,
            stop_token_ids=tuple(sorted(set(sampling.stop_token_ids))),
            logprobs=min(sampling.logprobs, vocab_size),
        )


def _kind(sampling: worker_pb2.SlotSampling, top_k: int) -> RowKind:
    if sampling.temperature == 0:
        return RowKind.GREEDY
    if 0 < top_k <= MAX_CANDIDATES:
        return RowKind.CANDIDATES
    if top_k:
        return RowKind.TOP_K_TOP_P if sampling.top_p < 1 else RowKind.TOP_K
    if sampling.top_p < 1:
        return RowKind.TOP_P
    return RowKind.MIN_P if sampling.min_p > 0 else RowKind.UNTRUNCATED


def _check(sampling: worker_pb2.SlotSampling) -> None:
    largest = sys.float_info.max
    for name, value, low, high in (
        ("temperature", sampling.temperature, 0, largest),
        ("top_p", sampling.top_p, 0, 1),
        ("min_p", sampling.min_p, 0, 1),
        ("repetition_penalty", sampling.repetition_penalty, 0, largest),
        ("presence_penalty", sampling.presence_penalty, -largest, largest),
        ("frequency_penalty", sampling.frequency_penalty, -largest, largest),
        ("logprobs", sampling.logprobs, -1, MAX_LOGPROBS),
    ):
        if not low <= value <= high:  # also where it is not a number
            raise ValueError(f"{name} {value} is out of range: expected {low:g} to {high:g}")
    if sampling.repetition_penalty == 0:
        raise ValueError("repetition_penalty must not be 0: 1 is off")

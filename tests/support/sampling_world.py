"""Samplers of a whole world in one process: each rank is a thread, its communicator a shared list."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from tpmodel.v1 import worker_pb2
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.rank.sampling import SampledTokens, Sampler

T = TypeVar("T")

DEADLINE_SECONDS = 60.0
CPU = torch.device("cpu")


class ThreadCommunicator(Communicator):
    """Gathers among threads, and counts how often."""

    name = "threads"

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[torch.Tensor | None]) -> None:
        self.rank = rank
        self.world_size = len(board)
        self.device = CPU
        self.gathers = 0
        self._barrier = barrier
        self._board = board

    def all_gather(self, tensor: torch.Tensor, outputs: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        self.gathers += 1
        return super().all_gather(tensor, outputs)

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._board[self.rank] = tensor
        self._barrier.wait()
        gathered = torch.stack([part for part in self._board if part is not None])
        self._barrier.wait()
        return gathered

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self._all_gather(tensor.clone()).sum(dim=0))

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        tensor.copy_(self._all_gather(tensor.clone())[root])

    def abort(self, reason: str) -> None:
        self._barrier.abort()

    def close(self) -> None:
        self._barrier.abort()


@dataclass
class Row:
    """One sequence: its slot's settings and what is known of it."""

    logits: torch.Tensor
    """(vocab_size,) float32."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt: Sequence[int] = ()
    outputs: Sequence[int] = ()
    position: int | None = None
    """Output tokens so far, where it is not the length of outputs."""
    active: bool = True


def slot_sampling(**settings: Any) -> worker_pb2.SlotSampling:
    """Settings as the engine resolves them, greedy unless told otherwise."""
    defaults = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 1000, "logprobs": -1}
    return worker_pb2.SlotSampling(**{**defaults, **settings})


class World:
    """Samplers of all ranks, driven together."""

    def __init__(self, world_size: int, vocab_size: int, max_slots: int = 64) -> None:
        self.world_size = world_size
        self.vocab_size = vocab_size
        self.vocab_shard = math.ceil(vocab_size / world_size / 64) * 64
        barrier = threading.Barrier(world_size, timeout=DEADLINE_SECONDS)
        board: list[torch.Tensor | None] = [None] * world_size
        self.communicators = [ThreadCommunicator(rank, barrier, board) for rank in range(world_size)]
        self.samplers = [
            Sampler(
                communicator,
                vocab_size=vocab_size,
                vocab_start=communicator.rank * self.vocab_shard,
                vocab_shard=self.vocab_shard,
                max_slots=max_slots,
                device=CPU,
            )
            for communicator in self.communicators
        ]

    def admit(self, slot: int, row: Row) -> None:
        for sampler in self.samplers:
            sampler.admit(slot, slot_sampling(**row.settings), row.prompt, row.outputs)

    def release(self, slot: int) -> None:
        for sampler in self.samplers:
            sampler.release(slot)

    def sample(
        self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int], active: Sequence[bool] | None = None
    ) -> SampledTokens:
        """One step on every rank; fails unless all ranks agree to the bit. logits: (R, vocab_size) float32."""
        padding = self.vocab_shard * self.world_size - self.vocab_size
        padded = torch.nn.functional.pad(logits, (0, padding), value=-torch.inf)
        shards = [shard.contiguous() for shard in padded.split(self.vocab_shard, dim=1)]
        before = [shard.clone() for shard in shards]

        def step(rank: int) -> SampledTokens:
            return self.samplers[rank].sample(
                shards[rank],
                slots=slots,
                output_counts=torch.tensor(positions),
                active=torch.tensor([True] * len(slots) if active is None else active),
            )

        results = self.on_every_rank(step)
        for shard, kept in zip(shards, before, strict=True):
            assert torch.equal(shard, kept), "the caller's logits were changed"
        first = results[0]
        for other in results[1:]:
            assert torch.equal(first.token_ids, other.token_ids)
            if first.logprobs is not None:
                assert other.logprobs is not None
                assert torch.equal(first.logprobs.chosen, other.logprobs.chosen)
                assert torch.equal(first.logprobs.top_values, other.logprobs.top_values)
                assert torch.equal(first.logprobs.top_ids, other.logprobs.top_ids)
        return first

    def sample_rows(self, rows: Sequence[Row]) -> list[int]:
        """Admits the rows to slots 0 on and samples them in one batch."""
        for slot, row in enumerate(rows):
            self.admit(slot, row)
        positions = [len(row.outputs) if row.position is None else row.position for row in rows]
        logits = torch.stack([row.logits for row in rows])
        return self.sample(logits, range(len(rows)), positions, [row.active for row in rows]).token_ids.tolist()

    def on_every_rank(self, step: Callable[[int], T]) -> list[T]:
        if self.world_size == 1:
            return [step(0)]

        def guarded(rank: int) -> T:
            try:
                return step(rank)
            except Exception as error:
                self.communicators[rank].abort(str(error))  # or the other ranks would wait for this one
                raise

        with ThreadPoolExecutor(self.world_size) as threads:
            futures = [threads.submit(guarded, rank) for rank in range(self.world_size)]
            return [future.result(timeout=DEADLINE_SECONDS) for future in futures]

"""Model shards in the test's own process, and the batches that a rank's runner would give them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from support.lockstep import LockstepCommunicator, LockstepWorld
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.loading.checkpoint_files import list_checkpoint_files, read_checkpoint
from tpmodel_worker.loading.dummy import fill_dummy
from tpmodel_worker.loading.plan import bind_parameters, plan_weights, target_view
from tpmodel_worker.loading.safetensors_reader import check_tensors, copy_tensors
from tpmodel_worker.models.batch import ForwardBatch, LayerCache, LayerKvCache, LayerState
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config import ModelConfig, read_model_config
from tpmodel_worker.models.registry import build_model


def load_shard(
    checkpoint: Path,
    communicator: Communicator,
    dtype: torch.dtype = torch.float32,
    *,
    expert_parallel: bool = False,
) -> CausalLanguageModel:
    """One rank's shard of a checkpoint, without a supervisor."""
    config = read_model_config(checkpoint, world_size=communicator.world_size, expert_parallel=expert_parallel)
    model, plan, arena = _empty_shard(config, communicator, dtype)
    entries = read_checkpoint(list_checkpoint_files(checkpoint))
    plan = plan_weights(model, entries)
    check_tensors(plan, entries)
    copy_tensors(plan, entries, arena, lambda done, total: None)
    bind_parameters(model, plan, arena)
    return model


def dummy_shard(
    config: ModelConfig, communicator: Communicator, *, seed: int, dtype: torch.dtype = torch.float32
) -> CausalLanguageModel:
    """One rank's shard with dummy weights."""
    model, plan, arena = _empty_shard(config, communicator, dtype)
    for planned in plan.parts:
        part = planned.part
        target = target_view(planned, plan, arena)
        fill_dummy(target, seed, part.checkpoint_name, part.shape, dimension=part.dimension, start=part.start)
    bind_parameters(model, plan, arena)
    return model


def _empty_shard(config: ModelConfig, communicator: Communicator, dtype: torch.dtype):
    model = build_model(config, communicator=communicator, dtype=dtype)
    plan = plan_weights(model)
    arena = Arena.create(ArenaId(communicator.rank, "weights", 0), plan.size, communicator.device)
    return model, plan, arena


class PagedSequences:
    """Sequences of one rank: a paged cache with scattered blocks, and the batches that advance them.

    Every rank that makes one with the same arguments gets the same block tables.
    """

    def __init__(
        self,
        model: CausalLanguageModel,
        sequences: int,
        *,
        max_length: int,
        block_size: int = 8,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model = model
        self._block_size = block_size
        self._device = torch.device(device)
        per_sequence = -(-max_length // block_size)
        blocks = list(range(sequences * per_sequence))
        random.Random(seed).shuffle(blocks)
        self._tables = torch.tensor(blocks, dtype=torch.int32).view(sequences, per_sequence)
        shape, state = (len(blocks) + 1, block_size, model.kv_heads, model.head_dim), model.state_shape
        self.caches: list[LayerCache] = []
        for keeps_state in model.keeps_state:
            if keeps_state and state is not None:
                convolution = torch.zeros((sequences, *state.convolution), dtype=dtype, device=device)
                self.caches.append(LayerState(convolution, torch.zeros((sequences, *state.recurrent), device=device)))
                continue
            # Rows that nothing has written hold what would show: attention must not read them.
            keys, values = (torch.full(shape, 1e3, dtype=dtype, device=device) for _ in range(2))
            self.caches.append(LayerKvCache(keys, values))
        self.lengths = [0] * sequences

    def batch(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> ForwardBatch:
        """The next tokens of some sequences; those with one token go first, as decodes. All rows are sampled."""
        ordered = sorted(chunks, key=lambda chunk: len(chunk[1]) > 1)
        token_ids, positions, rows, lengths, starts = [], [], [], [], [0]
        for sequence, tokens in ordered:
            first = self.lengths[sequence]
            for position, token in enumerate(tokens, first):
                block = int(self._tables[sequence, position // self._block_size])
                token_ids.append(token)
                positions.append(position)
                rows.append(block * self._block_size + position % self._block_size)
            lengths.append(first + len(tokens))
            starts.append(len(token_ids))
        device = self._device
        return ForwardBatch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            kv_rows=torch.tensor(rows, device=device),
            block_tables=self._tables[[sequence for sequence, _ in ordered]].to(device),
            slots=torch.tensor([sequence for sequence, _ in ordered], device=device),
            kv_lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            sample_rows=torch.arange(len(token_ids), device=device),
            decodes=sum(len(tokens) == 1 for _, tokens in ordered),
            query_lengths=tuple(len(tokens) for _, tokens in ordered),
            max_kv_length=max(lengths),
        )

    def step(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> dict[int, torch.Tensor]:
        """Computes the chunks; each sequence's logits shard, (tokens, vocab_shard)."""
        batch = self.batch(chunks)
        logits = self._model(batch, self.caches)
        ordered = sorted(chunks, key=lambda chunk: len(chunk[1]) > 1)
        parts = logits.split(batch.query_lengths)
        for sequence, tokens in chunks:
            self.lengths[sequence] += len(tokens)
        return {sequence: part for (sequence, _), part in zip(ordered, parts, strict=True)}


def world_logits(
    checkpoint: Path,
    world_size: int,
    steps: Sequence[Sequence[tuple[int, Sequence[int]]]],
    *,
    max_length: int,
    expert_parallel: bool = False,
) -> dict[int, torch.Tensor]:
    """Logits of every token of every sequence, gathered over a world of threads: (tokens, padded vocabulary)."""

    def run(communicator: LockstepCommunicator) -> dict[int, torch.Tensor]:
        sequences = 1 + max(sequence for step in steps for sequence, _ in step)
        shard = load_shard(checkpoint, communicator, expert_parallel=expert_parallel)
        paged = PagedSequences(shard, sequences, max_length=max_length)
        collected: dict[int, list[torch.Tensor]] = {}
        for step in steps:
            for sequence, logits in paged.step(step).items():
                collected.setdefault(sequence, []).append(logits)
        return {sequence: torch.cat(parts) for sequence, parts in collected.items()}

    shards = LockstepWorld(world_size).run(run)
    return {sequence: torch.cat([shard[sequence] for shard in shards], dim=1) for sequence in shards[0]}

"""Test entry of a rank: the logits of every position of given sequences, which gRPC never carries.

`python -m tpmodel_worker.rank.teacher_forcing JOB RANK`, once for each rank, with a job's JSON file. Rank 0
writes the logits of all sequences, (tokens of all sequences, vocabulary) float32, as a safetensors file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file

from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.comm.build import CommunicatorSpec, build_communicator
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.loading.load import LoadFormat, load_model
from tpmodel_worker.models.batch import ForwardBatch, LayerCache, LayerKvCache, LayerState
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config import read_model_config

_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherForcingJob:
    """What all ranks of one run are told."""

    model_path: str
    world_size: int
    device: str
    """cpu or cuda."""
    dtype: str
    load_format: LoadFormat
    sequences: list[list[int]]
    """Token ids."""
    chunk_size: int
    """Tokens of a step: 1 computes as decoding does, more as prefill does."""
    block_size: int
    rank_socket: str
    rendezvous: str
    output_file: str
    dummy_seed: int = 0

    def to_json(self) -> str:
        """The job as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what to_json wrote."""
        return cls(**json.loads(text))


def teacher_forced_logits(
    model: CausalLanguageModel,
    communicator: Communicator,
    token_ids: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    chunk_size: int,
    block_size: int,
) -> torch.Tensor:
    """The logits after every token of a sequence, from the shards of all ranks, which call it together.

    Returns:
        (len(token_ids), vocabulary) float32 on the device.
    """
    blocks = -(-len(token_ids) // block_size)
    caches = _empty_caches(model, blocks, block_size, dtype, device)
    tokens = torch.tensor(token_ids, dtype=torch.int64, device=device)
    positions = torch.arange(len(token_ids), device=device)
    rows: list[torch.Tensor] = []
    for start in range(0, len(token_ids), chunk_size):
        end = min(start + chunk_size, len(token_ids))
        shard = model.forward(_batch(tokens[start:end], positions[start:end], end, block_size), caches)
        gathered = communicator.all_gather(shard.contiguous())
        rows.append(gathered.transpose(0, 1).flatten(1)[:, : model.config.vocab_size])
    return torch.cat(rows)


def _empty_caches(
    model: CausalLanguageModel, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerCache]:
    """Caches of one sequence; its slot is 0."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    kv, state = (blocks + 1, block_size, model.kv_heads, model.head_dim), model.state_shape
    return [
        LayerState(zeros(1, *state.convolution), zeros(1, *state.recurrent, dtype=torch.float32))
        if kept and state is not None
        else LayerKvCache(keys=zeros(*kv), values=zeros(*kv))
        for kept in model.keeps_state
    ]


def _batch(tokens: torch.Tensor, positions: torch.Tensor, end: int, block_size: int) -> ForwardBatch:
    """One chunk of one sequence, whose blocks are 0, 1, 2, ..."""
    device = tokens.device
    length = len(tokens)
    return ForwardBatch(
        token_ids=tokens,
        positions=positions,
        kv_rows=positions,
        block_tables=torch.arange(-(-end // block_size), dtype=torch.int32, device=device).unsqueeze(0),
        slots=torch.zeros(1, dtype=torch.int64, device=device),
        kv_lengths=torch.tensor([end], dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, length], dtype=torch.int32, device=device),
        sample_rows=torch.arange(length, device=device),
        decodes=int(length == 1),
        query_lengths=(length,),
        max_kv_length=end,
    )


@torch.inference_mode()
def run(job: TeacherForcingJob, rank: int) -> None:
    """One rank's part of a job."""
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype: torch.dtype = getattr(torch, job.dtype)
    with ArenaClient(Path(job.rank_socket)) as arenas:
        spec = CommunicatorSpec(
            epoch=1,
            rank=rank,
            world_size=job.world_size,
            rendezvous=job.rendezvous,
            rendezvous_id=Path(job.output_file).name,
            timeout_seconds=_TIMEOUT_SECONDS,
            pods=("local",) * job.world_size,
        )
        communicator = build_communicator(spec, device=device, arenas=arenas)
        folder = Path(job.model_path)
        loaded = load_model(
            read_model_config(folder, world_size=job.world_size),
            rank=rank,
            world_size=job.world_size,
            communicator=communicator,
            device=device,
            dtype=dtype,
            load_format=job.load_format,
            paths=sorted(folder.glob("*.safetensors")),
            dummy_seed=job.dummy_seed,
            arenas=arenas,
            model_id=job.model_path,
            progress=lambda _what, _done, _total: None,
        )
        logits = [
            teacher_forced_logits(
                loaded.model,
                communicator,
                sequence,
                dtype=dtype,
                device=device,
                chunk_size=job.chunk_size,
                block_size=job.block_size,
            ).cpu()
            for sequence in job.sequences
        ]
        if rank == 0:
            save_file({"logits": torch.cat(logits)}, job.output_file)
        communicator.barrier()
        communicator.close()


if __name__ == "__main__":
    run(TeacherForcingJob.from_json(Path(sys.argv[1]).read_text()), int(sys.argv[2]))

"""Runs the rank's test entry: logits of all positions, from as many rank processes as the world has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from support.rank_link import RankLink
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.rank.teacher_forcing import TeacherForcingJob

_SECONDS = 600.0


def rank_logits(
    folder: Path,
    model_path: Path,
    sequences: Sequence[Sequence[int]],
    *,
    world_size: int,
    dtype: str = "float32",
    device: Literal["cpu", "cuda"] = "cpu",
    chunk_size: int = 64,
    block_size: int = 16,
    load_format: Literal["safetensors", "dummy"] = "safetensors",
    dummy_seed: int = 0,
) -> list[torch.Tensor]:
    """For each sequence (tokens, vocabulary) float32, computed by world_size ranks.

    folder: an empty one for the run's files.
    """
    store = start_store("127.0.0.1")
    socket_path = folder / "rank.sock"
    link = RankLink(socket_path, instance_id="")
    job = TeacherForcingJob(
        model_path=str(model_path),
        world_size=world_size,
        device=device,
        dtype=dtype,
        load_format=load_format,
        sequences=[list(sequence) for sequence in sequences],
        chunk_size=chunk_size,
        block_size=block_size,
        rank_socket=str(socket_path),
        rendezvous=f"127.0.0.1:{store.port}",
        output_file=str(folder / "logits.safetensors"),
        dummy_seed=dummy_seed,
    )
    job_file = folder / "job.json"
    job_file.write_text(job.to_json())
    command = [sys.executable, "-m", "tpmodel_worker.rank.teacher_forcing", str(job_file)]
    environment = os.environ if device == "cuda" else os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world_size)]
    try:
        for rank, process in enumerate(processes):
            assert process.wait(_SECONDS) == 0, f"rank {rank} ended with {process.returncode}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
        link.close()
    logits = load_file(job.output_file)["logits"]
    return list(logits.split([len(sequence) for sequence in sequences]))

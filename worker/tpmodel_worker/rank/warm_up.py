"""Has a process load ahead of need what the first steps of a rank need: kernels, library handles, their choices.

A CUDA kernel is loaded into a context when it first runs, Triton's too, and cuBLAS makes its handle and chooses
kernels at the first product of a shape. In a rank that takes a dead one's place all requests wait for that. So a spare
runs some steps of a small copy of the model: layers of the same shapes and dtype, as few as there are kinds of them.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.errors import ArenaMemoryError
from tpmodel_worker.arenas.keeper import NoKeeper
from tpmodel_worker.comm.without_peers import WithoutPeers
from tpmodel_worker.models.config import ModelConfig, parse_model_config
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.shard import ShardHolder
from tpmodel_worker.settings import ServeSettings

_VOCABULARY_PER_RANK = 8192
_SLOTS = 4
_PROMPT_TOKENS = 40
_OUTPUT_TOKENS = 12
_CACHE_BYTES = 256 << 20
"""An upper bound; only the blocks of these few sequences are made."""

_logger = logging.getLogger(__name__)


def warm_up(settings: ServeSettings, device: torch.device) -> None:
    """Runs a few steps of a small copy of the model on the device, and gives its memory back.

    Where there is no memory for that, it says so and leaves the first steps as slow as they are.

    Raises:
        RuntimeError: the device failed, and is of no use to this process any more.
    """
    started = time.perf_counter()
    holder = ShardHolder(rank=0, device=device, arenas=NoKeeper())
    try:
        with torch.inference_mode():
            _run(settings, holder, device)
    except (torch.OutOfMemoryError, ArenaMemoryError, RequestError) as error:
        _logger.warning("no kernels are loaded ahead on %s: %s", device, error)
    else:
        _logger.info("kernels are loaded ahead on %s, in %.2f s", device, time.perf_counter() - started)
    finally:
        holder.unload()


def _run(settings: ServeSettings, holder: ShardHolder, device: torch.device) -> None:
    config = json.loads((Path(settings.model_path) / "config.json").read_text(encoding="utf-8"))
    small = small_copy(config, world_size=settings.world_size)
    slots = min(_SLOTS, settings.max_num_seqs)
    communicator = WithoutPeers(device, settings.world_size)
    request = pb.LoadDenseShardRequest(
        model_id=settings.model_id,
        config_json=json.dumps(small),
        load_format="dummy",
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=slots,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=settings.block_size,
        kv_cache_bytes=_CACHE_BYTES,
        state_snapshots=0,
        expert_parallel=settings.expert_parallel,
    )
    holder.load(request, communicator, ranks_on_host=1, progress=lambda _what, _done, _total: None)
    prompt = min(_PROMPT_TOKENS, settings.max_model_len // 2, settings.max_num_batched_tokens // slots)
    blocks = -(-(prompt + _OUTPUT_TOKENS) // settings.block_size)
    runner = holder.clear(slots * blocks, communicator)
    for seq, plan in enumerate(_plans(slots, prompt, blocks), start=1):
        runner.execute(seq, plan, submit=lambda _outcome: None, check=lambda: None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _plans(slots: int, prompt: int, blocks: int) -> Iterable[pb.GenerateStepRequest]:
    """Prompts, decodes of all sequences and of one, and the end; greedy ones and sampled ones."""
    first = pb.GenerateStepRequest(steps=1)
    for slot in range(slots):
        sampling = pb.SlotSampling(max_tokens=_OUTPUT_TOKENS, top_p=1.0, repetition_penalty=1.0, logprobs=-1)
        if slot % 2:
            sampling.temperature, sampling.seed, sampling.top_p = 0.8, slot, 0.9 if slot > 2 else 1.0
        first.admissions.add(
            slot=slot, token_ids=list(range(prompt)), prompt_length=prompt, computed_length=0, sampling=sampling
        )
        first.block_table_deltas.add(slot=slot, start=0, blocks=range(slot * blocks, (slot + 1) * blocks))
        first.prefill_chunks.add(slot=slot, length=prompt)
    yield first
    yield pb.GenerateStepRequest(steps=2, decode_slots=range(slots))
    yield pb.GenerateStepRequest(steps=1, decode_slots=[0])
    yield pb.GenerateStepRequest(steps=0, releases=range(slots), ack_now=True)


def small_copy(config: dict[str, Any], *, world_size: int) -> dict[str, Any]:
    """A config.json with the first layers only, of every kind at least one, and with a part of the vocabulary.

    world_size: of the ranks that share the model.
    """
    layers = _layers_of_all_kinds(parse_model_config(config, world_size=world_size))
    small = copy.deepcopy(config)
    for part in (small, small.get("text_config")):
        if not isinstance(part, dict):
            continue
        if "num_hidden_layers" in part:
            part["num_hidden_layers"] = layers
        if isinstance(part.get("layer_types"), list):
            part["layer_types"] = part["layer_types"][:layers]
        if isinstance(part.get("mlp_only_layers"), list):
            part["mlp_only_layers"] = [layer for layer in part["mlp_only_layers"] if layer < layers]
        if "vocab_size" in part:
            part["vocab_size"] = min(part["vocab_size"], _VOCABULARY_PER_RANK * world_size)
        part.pop("eos_token_id", None)
    return small


def _layers_of_all_kinds(config: ModelConfig) -> int:
    """How many layers, from the first on, have one of each kind."""
    linear = set(config.linear_attention.layers) if config.linear_attention is not None else set[int]()
    experts = set(config.experts.layers) if config.experts is not None else set[int]()
    kinds = [(layer in linear, layer in experts) for layer in range(config.num_hidden_layers)]
    return max(kinds.index(kind) for kind in set(kinds)) + 1

"""Steps of one rank as it executes plans: model, sampler, slots and caches, without engine and supervisor."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.loading.plan import bind_parameters, plan_weights
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config import ModelConfig, parse_model_config
from tpmodel_worker.models.registry import build_model
from tpmodel_worker.rank.cache_sizes import KvShape
from tpmodel_worker.rank.kv_cache import KvCache
from tpmodel_worker.rank.plan_check import PlanLimits
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.rank.sampling import Sampler
from tpmodel_worker.rank.slots import SlotLimits, SlotTable

BLOCK_SIZE = 16
PLAN_STEPS = 8


class OnlyRank(Communicator):
    """Rank 0 of a larger world whose other ranks are missing: what they would have sent is left out.

    Computes what the rank computes, and nothing that makes sense.
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self.name = "none"
        self.rank = 0
        self.world_size = world_size
        self.device = device

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        """Leaves the rank's own share."""

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0).repeat(self.world_size, *([1] * tensor.dim()))

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Leaves what is there."""

    def abort(self, reason: str) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """There is nothing to give back."""


class NoSupervisor(ArenaClient):
    """Arenas stay with this process."""

    def __init__(self) -> None:
        """Connects to nothing."""

    def store(self, arena: Arena, manifest: pb.ArenaManifest) -> None:
        """Nobody takes it."""

    def release(self, arena_id: ArenaId) -> None:
        """Nobody has it."""


class OwnSteps:
    """One rank's shard with dummy weights, made on its device."""

    def __init__(
        self,
        config: dict[str, Any],
        communicator: Communicator,
        *,
        dtype: torch.dtype,
        max_seqs: int,
        max_tokens: int,
        step_tokens: int,
        expert_parallel: bool,
    ) -> None:
        """max_tokens: of all sequences together; step_tokens: most that one step prefills."""
        self.device = communicator.device
        world_size = communicator.world_size
        parsed = parse_model_config(config, world_size=world_size, expert_parallel=expert_parallel)
        self.model = dummy_model(parsed, communicator, dtype)
        self._vocabulary, self._step_tokens = parsed.vocab_size, step_tokens
        self.kv_shape = KvShape.of_model(self.model, block_size=BLOCK_SIZE, dtype=dtype, slots=max_seqs)
        blocks = max_tokens // BLOCK_SIZE + max_seqs
        slots = SlotLimits(max_slots=max_seqs, block_size=BLOCK_SIZE, max_blocks=blocks, num_blocks=blocks)
        cache = KvCache(
            self.kv_shape,
            blocks,
            keeps_state=self.model.keeps_state,
            rank=communicator.rank,
            device=self.device,
            arenas=NoSupervisor(),
        )
        sampler = Sampler(
            communicator,
            vocab_size=parsed.vocab_size,
            vocab_start=self.model.vocab_start,
            vocab_shard=self.model.vocab_shard,
            max_slots=max_seqs,
            device=self.device,
        )
        self._runner = StepRunner(
            model=self.model,
            cache=cache,
            slots=SlotTable(slots, self.device),
            sampler=sampler,
            limits=PlanLimits(slots, parsed.vocab_size, step_tokens, keeps_state=self.kv_shape.states is not None),
            device=self.device,
        )
        self._seq = 0
        self._used = 0

    def decode(self, batch: int, context: int, *, steps: int) -> float:
        """Seconds of one step that decodes `batch` sequences of about `context` tokens, greedily; mean of `steps`."""
        plans = -(-steps // PLAN_STEPS)
        self._admit([context] * batch, outputs=(plans + 1) * PLAN_STEPS + 1)
        prompts = list(range(batch))
        at_once = max(self._step_tokens // context, 1)
        for first in range(0, batch, at_once):
            chunks = [pb.PrefillChunk(slot=slot, length=context) for slot in prompts[first : first + at_once]]
            self._execute(pb.GenerateStepRequest(prefill_chunks=chunks, steps=1))
        plan = pb.GenerateStepRequest(decode_slots=prompts, steps=PLAN_STEPS)
        self._execute(plan)
        started = self._now()
        for _ in range(plans):
            self._execute(plan)
        return (self._now() - started) / (plans * PLAN_STEPS)

    def prefill(self, tokens: int) -> float:
        """Seconds of the step that computes one prompt and samples its first token."""
        self._admit([tokens], outputs=1)
        started = self._now()
        self._execute(pb.GenerateStepRequest(prefill_chunks=[pb.PrefillChunk(slot=0, length=tokens)], steps=1))
        return self._now() - started

    def _admit(self, lengths: list[int], *, outputs: int) -> None:
        """Empties the slots and fills them with random prompts."""
        plan = pb.GenerateStepRequest(releases=range(self._used))
        rng, block = random.Random(0), 0
        for slot, length in enumerate(lengths):
            sampling = pb.SlotSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=outputs, logprobs=-1)
            tokens = [rng.randrange(self._vocabulary) for _ in range(length)]
            plan.admissions.append(pb.Admission(slot=slot, token_ids=tokens, prompt_length=length, sampling=sampling))
            count = -(-(length + outputs) // BLOCK_SIZE)
            plan.block_table_deltas.append(pb.BlockTableDelta(slot=slot, blocks=range(block, block + count)))
            block += count
        self._used = len(lengths)
        self._execute(plan)

    @torch.inference_mode()
    def _execute(self, plan: pb.GenerateStepRequest) -> None:
        self._seq += 1
        self._runner.execute(self._seq, plan, submit=lambda outcome: None, check=lambda: None)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.inference_mode()
def dummy_model(config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> CausalLanguageModel:
    """A rank's shard with weights that the device draws: another draw than --load-format dummy, and quicker."""
    model = build_model(config, communicator=communicator, dtype=dtype)
    plan = plan_weights(model)
    arena = Arena.create(ArenaId(communicator.rank, "weights", 0), plan.size, communicator.device)
    for tensor in plan.tensors.values():
        view = arena.view(tensor.offset, tensor.shape, tensor.dtype)
        if len(tensor.shape) == 1:
            view.fill_(0.5)
        else:
            view.normal_(std=0.02)
    bind_parameters(model, plan, arena)
    # The parameters keep the memory; once they are gone, a peer needs it.
    arena.close()
    return model

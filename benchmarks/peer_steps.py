"""transformers' own steps with the same shapes: dummy weights, greedy, its default cache, kernels and shards."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

_WARM_STEPS = 8


class PeerSteps:
    """The whole model on one device, or a rank's shard of it."""

    def __init__(
        self, config: dict[str, Any], *, dtype: torch.dtype, device: torch.device, mesh: DeviceMesh | None = None
    ) -> None:
        """mesh: of all ranks, where the model is to be cut as its own tensor-parallel plan says."""
        parsed = AutoConfig.for_model(**config)
        with device:
            self._model = AutoModelForCausalLM.from_config(parsed, dtype=dtype).eval()
        if mesh is not None:
            # As from_pretrained does it, which would need a checkpoint; each rank keeps its part of its own draw.
            plan = DistributedConfig(tp_size=mesh.size(), tp_plan="auto")
            self._model = type(self._model).maybe_distribute_model(self._model, plan, mesh)
        # Every rank has to feed the same tokens.
        self._draw = torch.Generator(device).manual_seed(0)
        self._device, self._vocabulary = device, config["vocab_size"]

    @torch.inference_mode()
    def decode(self, batch: int, context: int, *, steps: int) -> float:
        """As OwnSteps.decode."""
        tokens, cache = self._first(batch, context)
        for _ in range(_WARM_STEPS):
            tokens = self._next(tokens, cache)
        started = self._now()
        for _ in range(steps):
            tokens = self._next(tokens, cache)
        return (self._now() - started) / steps

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """As OwnSteps.prefill."""
        started = self._now()
        self._first(1, tokens)
        return self._now() - started

    def _first(self, batch: int, length: int) -> tuple[torch.Tensor, Any]:
        """The first tokens after random prompts, and the cache."""
        prompts = torch.randint(self._vocabulary, (batch, length), device=self._device, generator=self._draw)
        outputs = self._model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1:].argmax(dim=-1), outputs.past_key_values

    def _next(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        outputs = self._model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return outputs.logits[:, -1:].argmax(dim=-1)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def join_peer_world(rank: int, world_size: int, store_port: int, device: torch.device) -> DeviceMesh:
    """The ranks of transformers' world; torch's default group, as transformers wants it."""
    torch.distributed.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{store_port}",
        rank=rank,
        world_size=world_size,
    )
    return init_device_mesh(device.type, (world_size,))

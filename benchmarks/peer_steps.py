"""transformers' own steps with the same shapes: dummy weights, greedy, its default cache and kernels."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_WARM_STEPS = 8


class PeerSteps:
    """The whole model on one device."""

    def __init__(self, config: dict[str, Any], *, dtype: torch.dtype, device: torch.device) -> None:
        parsed = AutoConfig.for_model(**config)
        with device:
            self._model = AutoModelForCausalLM.from_config(parsed, dtype=dtype).eval()
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
        prompts = torch.randint(self._vocabulary, (batch, length), device=self._device)
        outputs = self._model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1:].argmax(dim=-1), outputs.past_key_values

    def _next(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        outputs = self._model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return outputs.logits[:, -1:].argmax(dim=-1)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

"""The bf16 rule: how far served tokens and logits may be from transformers where exact ties are common.

The yardstick is transformers' own error: the root mean square difference of its bf16 logits from its float32
logits on the same checkpoint. Teacher-forced, every chosen token's reference logit lies within 6 of it of the
reference's best; and the ranks' own error over at least 4,096 positions is at most 1.5 of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tpmodel_worker.loading.dummy import fill_dummy

TOKEN_FACTOR = 6.0
LOGITS_FACTOR = 1.5
POSITIONS = 4096


def checkpoint_model(checkpoint: Path, dtype: torch.dtype, device: str) -> Any:
    """The checkpoint in transformers; its bf16 weights, computed in dtype."""
    model: Any = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    return torch.nn.Module.to(model.eval(), device=device, dtype=dtype)


def dummy_model(config: dict[str, Any], seed: int, dtype: torch.dtype, device: str) -> Any:
    """A transformers model with the same weights as `--load-format dummy` in bf16, computed in dtype."""
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(Qwen3Config(**config))
    model = torch.nn.Module.to_empty(model, device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Filled in bf16 first, since those are the weights that are served.
            stored = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            fill_dummy(stored, seed, name, parameter.shape)
            parameter.data = stored.to(dtype)
    # Not a parameter, so it was left empty.
    fresh = type(model.model.rotary_emb)(config=model.config)
    model.model.rotary_emb = torch.nn.Module.to(fresh, device=device)
    return model.eval()


@torch.inference_mode()
def logits_of(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """(len(token_ids), vocabulary) float32 on the model's device."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    return model(input_ids=ids).logits[0].float()


@dataclass(frozen=True, slots=True)
class Yardstick:
    """transformers' own error."""

    rms: float

    def check_tokens(self, model: Any, prompt: Sequence[int], served: Sequence[int], *, what: str) -> None:
        """Fails where a served token is too far from the reference's best. model: in bf16."""
        logits = logits_of(model, [*prompt, *served[:-1]])[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(served, device=logits.device)[:, None])[:, 0]
        gaps = logits.amax(dim=-1) - chosen
        worst = int(gaps.argmax())
        limit = TOKEN_FACTOR * self.rms
        differing = int((gaps > 0).sum())
        found = f"{differing} of {len(served)} tokens differ, largest gap {float(gaps[worst]):.4f}"
        print(f"{what}: {found}, limit {limit:.4f}")
        assert float(gaps[worst]) <= limit, f"{what}: output {worst} is {float(gaps[worst]):.4f} below the best"

    def check_logits(self, own_rms: float, *, what: str) -> None:
        """Fails where the ranks' logits are worse than transformers' by more than the factor."""
        print(f"{what}: RMS logit error {own_rms:.5f}, transformers' own {self.rms:.5f}")
        assert own_rms <= LOGITS_FACTOR * self.rms


def rms(difference: torch.Tensor) -> float:
    """Root mean square."""
    return float(difference.double().square().mean().sqrt())

"""A small model that is really trained, beside a server that serves it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.oracle import TIE

TOKEN = "a trainer's token"


class TrainedModel:
    """A checkpoint's model with an optimiser."""

    def __init__(self, checkpoint: Path) -> None:
        # Threads of torch's own that wait for each other are slow where processors are few.
        torch.set_num_threads(1)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
        self._optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self._generator = torch.Generator().manual_seed(0)

    def train(self, steps: int = 3) -> float:
        """Steps of next-token loss on random sequences; the last loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            ids = torch.randint(2, self.model.config.vocab_size, (4, 24), generator=self._generator)
            loss = self.model(input_ids=ids, labels=ids).loss
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
        return float(loss.detach())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """By their names in the checkpoint."""
        return self.model.state_dict()

    def chooses(self, prompt: list[int], token_ids: list[int]) -> bool:
        """Whether the tokens are greedy ones of the present weights."""
        return chooses(self.model, prompt, token_ids)


@torch.inference_mode()
def chooses(model: PreTrainedModel, prompt: list[int], token_ids: list[int]) -> bool:
    """Whether the tokens are the model's own greedy ones behind the prompt, teacher-forced, ties aside."""
    logits = model(input_ids=torch.tensor([[*prompt, *token_ids[:-1]]])).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return bool((logits.max(dim=-1).values - chosen <= TIE).all())

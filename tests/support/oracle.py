"""Compares served tokens with transformers, by the rule of the design's section on correctness.

Float32: every served token must be the reference's choice given the tokens before it, or its reference logit
must lie within 1e-4 of the best one (a tie); a suite may have three ties in all.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

# Those of whose functions transformers takes kernels of other packages for, where it finds some.
_WITH_FOREIGN_KERNELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
_FOREIGN_KERNELS = ("fla", "causal_conv1d")

TIE = 1e-4
TIES_ALLOWED = 3


@contextmanager
def _hidden(packages: Sequence[str]) -> Iterator[None]:
    """Importing one of the packages fails."""
    present = {name: sys.modules[name] for name in packages if name in sys.modules}
    sys.modules.update(dict.fromkeys(packages))  # pyright: ignore[reportCallIssue, reportArgumentType]
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]
        sys.modules.update(present)


# The reference is plain torch on the CPU, also where fla-core is installed, which takes tensors of GPUs only.
with _hidden(_FOREIGN_KERNELS):
    for _name in _WITH_FOREIGN_KERNELS:
        importlib.import_module(f"transformers.models.{_name}.modeling_{_name}")


@dataclass(slots=True)
class TieLedger:
    """Ties of one suite."""

    ties: list[str] = field(default_factory=list)

    def add(self, description: str) -> None:
        """Records a tie; fails the test once there are too many."""
        self.ties.append(description)
        print(f"tie {len(self.ties)}: {description}")
        assert len(self.ties) <= TIES_ALLOWED, self.ties


class Reference:
    """A checkpoint in transformers, float32, on the CPU."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of all positions: (len(token_ids), vocabulary) float32."""
        return self.model(input_ids=torch.tensor([list(token_ids)])).logits[0].float()

    def check_greedy(self, prompt: Sequence[int], served: Sequence[int], ledger: TieLedger, *, what: str) -> None:
        """Fails unless the served tokens are the reference's own, teacher-forced."""
        logits = self.logits([*prompt, *served[:-1]])[len(prompt) - 1 :]
        best = logits.max(dim=-1)
        chosen = logits.gather(1, torch.tensor(served)[:, None])[:, 0]
        for position in (best.indices != torch.tensor(served)).nonzero()[:, 0].tolist():
            gap = float(best.values[position] - chosen[position])
            assert gap <= TIE, (
                f"{what}: output {position} is {served[position]}, transformers chooses "
                f"{int(best.indices[position])}, whose logit is {gap:.3g} higher"
            )
            ledger.add(f"{what}: output {position}, gap {gap:.3g}")

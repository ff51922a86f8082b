"""The linear layers' product. On the CPU the same numbers by whichever of the libraries is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T: (T, inputs), (outputs, inputs) -> (T, outputs), contiguous.

    In float32 on the CPU F.linear is MKL's product, which for a few rows, a decode step, reaches a third to a half of
    the memory's bandwidth. oneDNN's reaches nearly all of it, and computes many rows faster too on processors that
    are not MKL's maker's. benchmarks/linear_cpu.py compares the two.
    """
    if hidden.is_cuda or hidden.dtype != torch.float32 or not _HAS_ONEDNN:
        return F.linear(hidden, weight)
    # What torch.compile makes of F.linear on the CPU; in eager mode torch has oneDNN for float32 nowhere else.
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")

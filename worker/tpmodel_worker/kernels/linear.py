"""The linear layers' product. On the CPU the same numbers by whichever call of the libraries is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

FEW_ROWS = 5
"""Up to so many rows the product with the weights on the left is the fastest."""
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T: (T, inputs), (outputs, inputs) -> (T, outputs), contiguous.

    In float32 on the CPU F.linear is MKL's product: for one or a few rows it reaches a third to a half of the
    memory's bandwidth, where the product with the weights on the left reaches nearly all of it; for more rows, on
    processors that are not its maker's, oneDNN computes up to twice as fast. benchmarks/linear_cpu.py compares.
    """
    rows = hidden.shape[0]
    if hidden.is_cuda or hidden.dtype != torch.float32:
        return F.linear(hidden, weight)
    if rows == 1:
        # One column would be a matrix-vector product again.
        return torch.mm(weight, hidden.repeat(2, 1).t()).t()[:1].contiguous()
    if rows <= FEW_ROWS:
        return torch.mm(weight, hidden.t()).t().contiguous()
    if not _HAS_ONEDNN:
        return F.linear(hidden, weight)
    # What torch.compile calls for F.linear on the CPU; in eager mode torch reaches it for no float32 product.
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")

"""The linear layers' product. On the CPU the same numbers by whichever call of the library is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

MOST_ROWS = 48
"""Up to so many rows weight @ hidden.T is faster than hidden @ weight.T, with several threads."""
MOST_ROWS_ONE_THREAD = 5


def linear(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden @ weight.T: (T, inputs), (outputs, inputs) -> (T, outputs), contiguous.

    A decode step reads all weights for a few rows. In float32 the library's matrix-vector product, and its
    product with few rows on the left, reach a third to a half of the memory's bandwidth; with the weights on the
    left it is nearly all of it. benchmarks/linear_cpu.py compares the two.
    """
    rows = hidden.shape[0]
    if hidden.is_cuda or hidden.dtype != torch.float32 or rows > _most_rows():
        return F.linear(hidden, weight)
    if rows == 1:
        # One column would be a matrix-vector product again.
        return torch.mm(weight, hidden.repeat(2, 1).t()).t()[:1].contiguous()
    return torch.mm(weight, hidden.t()).t().contiguous()


def _most_rows() -> int:
    return MOST_ROWS if torch.get_num_threads() > 1 else MOST_ROWS_ONE_THREAD

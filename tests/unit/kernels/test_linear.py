"""The product is that of F.linear, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from tpmodel_worker.kernels.linear import linear


@pytest.mark.parametrize("rows", [1, 2, 5, 48, 300])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_rows_gives_the_product(rows: int, threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hidden, weight = torch.randn(rows, 96).to(dtype), torch.randn(33, 96).to(dtype)
        product = linear(hidden, weight)
    finally:
        torch.set_num_threads(before)
    assert product.is_contiguous()
    assert product.shape == (rows, 33)
    torch.testing.assert_close(
        product, F.linear(hidden, weight), rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4
    )

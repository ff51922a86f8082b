"""A kernel that is launched again, without Triton's own preparations, is the one that Triton would take."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tpmodel_worker.kernels.fusion import silu_and_multiply

pytestmark = pytest.mark.gpu
TOKENS = 3


def right(gate_up: torch.Tensor) -> bool:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return torch.allclose(silu_and_multiply(gate_up).double(), F.silu(gate) * up, rtol=1e-2, atol=1e-2)


def rows(features: int, *, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> torch.Tensor:
    """Contiguous rows whose first element lies `offset` elements behind an aligned address."""
    count = TOKENS * 2 * features
    return torch.randn(offset + count, device="cuda").to(dtype)[offset:].view(TOKENS, 2 * features)


@pytest.mark.parametrize("features", [[4096, 1, 17], [1, 4096, 17], [17, 4096, 1]])
def test_sizes_that_are_multiples_of_sixteen_that_are_not_and_one_take_turns(features: list[int]):
    """Triton has a kernel of its own for each kind, and the last one would be wrong for the next."""
    assert all(right(rows(size)) for size in features * 2)


def test_an_address_that_is_not_aligned_follows_one_that_is():
    assert all(right(rows(256, offset=offset)) for offset in (0, 1, 0))


def test_dtypes_take_turns():
    assert all(right(rows(64, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32))


def test_a_launch_goes_to_the_current_stream():
    """What comes before it there is done when it reads."""
    gate_up = rows(64)
    silu_and_multiply(gate_up)
    gate_up.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        gate_up.fill_(1)
        activated = silu_and_multiply(gate_up)
    stream.synchronize()
    assert activated.float().min() > 0.7

"""Products of a mixture of experts against the plain formula, token by token."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tpmodel_worker.kernels.experts import mix_experts, multiply_grouped, multiply_looped, route


def make_case(tokens, *, experts=7, per_token=3, hidden=16, features=24, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    # The last expert gets no token.
    chosen = [torch.randperm(experts - 1, generator=generator)[:per_token] for _ in range(tokens)]
    ids = torch.stack(chosen).to(device)
    weights = random(tokens, per_token).abs()
    gate_up, down = random(experts, 2 * features, hidden) / 4, random(experts, hidden, features) / 4
    return random(tokens, hidden), ids, weights, gate_up, down


def plain(hidden, ids, weights, gate_up, down):
    rows = []
    for token, experts, shares in zip(hidden.double(), ids.tolist(), weights.double(), strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(experts, shares, strict=True):
            gate, up = (gate_up[expert].double() @ token).chunk(2)
            total += share * (down[expert].double() @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_every_token_meets_its_experts(tokens):
    case = make_case(tokens)
    assert float((mix_experts(*case) - plain(*case)).abs().max()) < 1e-5


def check_shares(tokens, tolerance, **changes):
    """Two halves of the experts, each without the other's, add up to all of them."""
    hidden, ids, weights, gate_up, down = case = make_case(tokens, experts=8, **changes)
    halves = [
        mix_experts(hidden, ids, weights, gate_up[first : first + 4], down[first : first + 4], first=first)
        for first in (0, 4)
    ]
    assert float((halves[0].double() + halves[1].double() - plain(*case)).abs().max()) < tolerance


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_that_are_elsewhere_add_nothing(tokens):
    check_shares(tokens, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_experts_that_are_elsewhere_add_nothing_on_cuda(tokens, dtype, tolerance):
    check_shares(tokens, tolerance, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_every_token_meets_its_experts_on_cuda(tokens, dtype, tolerance):
    case = make_case(tokens, dtype=dtype, device="cuda")
    assert float((mix_experts(*case) - plain(*case)).abs().max()) < tolerance


def test_the_grouped_product_is_the_loop():
    """What runs on CUDA in bfloat16; torch computes it on the CPU too."""
    hidden, ids, _, gate_up, down = make_case(40, dtype=torch.bfloat16)
    flat = ids.flatten().sort()
    rows, counts = hidden[flat.indices // 3], torch.bincount(flat.values, minlength=7)
    looped = multiply_looped(rows, counts, gate_up, down)
    assert torch.allclose(multiply_grouped(rows, counts, gate_up, down).float(), looped.float(), atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("experts", "per_token"), [(9, 3), (128, 8), (512, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_routes_as_torch_does(dtype, experts, per_token, normalise):
    """Logits are all different, so that there is one choice."""
    orders = [torch.randperm(experts, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    logits = (torch.stack(orders).float() / 64).to(dtype)
    ids, weights = route(logits.cuda(), per_token, normalise=normalise)
    expected_ids, expected = route(logits, per_token, normalise=normalise)
    if dtype == torch.float32:
        assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu().float(), expected.float(), atol=0, rtol=1e-2)

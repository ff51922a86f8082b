"""Tokens are drawn with the exact probabilities: chi-square tests over 20,000 draws, seeds fixed beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.sampling_world import Row, World

VOCAB_SIZE = 90
SLOTS, STEPS = 2000, 10
SIGNIFICANCE = 1e-4
LOGITS = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(2024)) * 2


def exact_probabilities(
    logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The definition, word by word, in float64 on the sorted whole vocabulary."""
    probabilities = torch.softmax(logits.double() / temperature, dim=0)
    order = torch.argsort(probabilities, descending=True, stable=True)
    kept = probabilities[order]
    if top_k:
        kept[top_k:] = 0
    kept = kept / kept.sum()
    before = kept.cumsum(0) - kept
    if top_p < 1:
        kept[(before >= top_p) & (torch.arange(len(kept)) > 0)] = 0
    kept[kept < min_p * kept[0]] = 0
    result = torch.zeros_like(probabilities)
    result[order] = kept / kept.sum()
    return result


def draw_counts(world_size: int, settings: dict[str, Any], vary: str) -> torch.Tensor:
    """How often each token comes in SLOTS * STEPS draws that differ in the position and in `vary`."""
    world = World(world_size, VOCAB_SIZE, max_slots=SLOTS)
    for slot in range(SLOTS):
        world.admit(slot, Row(LOGITS, {"seed": 77, **settings, vary: slot}))
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    logits = LOGITS.repeat(SLOTS, 1)
    for step in range(STEPS):
        tokens = world.sample(logits, range(SLOTS), [step] * SLOTS).token_ids
        counts += torch.bincount(tokens, minlength=VOCAB_SIZE)
    return counts


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    draws = int(counts.sum())
    assert counts[probabilities == 0].sum() == 0, "a dropped token was drawn"
    expected = probabilities * draws
    frequent = expected >= 5
    observed = counts.double()
    # Rare tokens share one cell, or the statistic is no chi-square.
    cells = torch.cat([observed[frequent], observed[~frequent].sum().view(1)])
    wanted = torch.cat([expected[frequent], expected[~frequent].sum().view(1)])
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    statistic = ((cells - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor(len(cells) - 1.0, dtype=torch.float64)
    if freedom == 0:
        return
    p_value = float(torch.special.gammaincc(freedom / 2, statistic / 2))
    assert p_value > SIGNIFICANCE, f"chi-square {float(statistic):.1f} at {int(freedom)} degrees: p {p_value:.2e}"


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.2, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 1.1, "top_k": 30, "top_p": 0.9, "min_p": 0.03},
    ],
    ids=lambda limits: "-".join(f"{name}_{value}" for name, value in limits.items()),
)
def test_draws_follow_the_exact_probabilities(limits: dict[str, Any]):
    assert_drawn_from(draw_counts(1, limits, vary="seed"), exact_probabilities(LOGITS, **limits))


def test_a_top_k_too_large_for_candidates_follows_the_exact_probabilities(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tpmodel_worker.rank.slot_settings.MAX_CANDIDATES", 16)
    limits = {"temperature": 1.1, "top_k": 30, "top_p": 0.9, "min_p": 0.03}
    assert_drawn_from(draw_counts(2, limits, vary="seed"), exact_probabilities(LOGITS, **limits))


def test_samples_of_one_seed_are_independent():
    counts = draw_counts(2, {"temperature": 1.0}, vary="sample_index")
    assert_drawn_from(counts, exact_probabilities(LOGITS))


def test_the_chi_square_notices_a_wrong_temperature():
    counts = draw_counts(1, {"temperature": 1.0}, vary="seed")
    with pytest.raises(AssertionError, match="chi-square"):
        assert_drawn_from(counts, exact_probabilities(LOGITS, temperature=1.1))

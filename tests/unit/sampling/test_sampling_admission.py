"""What the sampler refuses, and what it forgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.sampling_world import Row, World, slot_sampling

LOGITS = torch.linspace(3, 0, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, r"temperature -0.5 is out of range"),
        ({"temperature": float("nan")}, r"temperature nan is out of range"),
        ({"temperature": float("inf")}, r"temperature inf is out of range"),
        ({"top_p": 1.5}, r"top_p 1.5 is out of range: expected 0 to 1"),
        ({"min_p": -0.1}, r"min_p -0.1 is out of range: expected 0 to 1"),
        ({"logprobs": 21}, r"logprobs 21 is out of range: expected -1 to 20"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must not be 0"),
        ({"presence_penalty": float("inf")}, r"presence_penalty inf is out of range"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        World(1, 64).admit(0, Row(LOGITS, settings))


@pytest.mark.parametrize("slot", [-1, 64])
def test_a_slot_that_does_not_exist_is_refused(slot: int):
    with pytest.raises(ValueError, match=f"slot {slot} does not exist: expected 0 to 63"):
        World(1, 64).admit(slot, Row(LOGITS))


def test_a_slot_that_was_not_admitted_is_refused_before_any_collective():
    world = World(1, 64)
    world.admit(0, Row(LOGITS))
    with pytest.raises(ValueError, match=r"slots \[5\] were not admitted"):
        world.sample(LOGITS.repeat(2, 1), [0, 5], [0, 0])
    assert world.communicators[0].gathers == 0


def test_logits_of_another_shape_are_refused():
    world = World(1, 64)
    world.admit(0, Row(LOGITS))
    with pytest.raises(ValueError, match=r"shape \(2, 64\), expected \(1, 64\)"):
        world.sample(LOGITS.repeat(2, 1), [0], [0])


def test_a_refused_admission_leaves_the_slot_as_it_was():
    world = World(1, 64)
    world.admit(0, Row(LOGITS))
    with pytest.raises(ValueError, match="top_p"):
        world.admit(0, Row(LOGITS, {"top_p": 2.0}))
    assert world.sample(LOGITS.unsqueeze(0), [0], [0]).token_ids.tolist() == [0]


def test_a_readmitted_slot_takes_its_new_settings():
    world = World(2, 128)
    logits = torch.linspace(3, 0, 128)
    world.admit(0, Row(logits, {"presence_penalty": 50.0}, outputs=[0, 1]))
    assert world.sample(logits.unsqueeze(0), [0], [2]).token_ids.tolist() == [2]
    world.admit(0, Row(logits))
    assert world.sample(logits.unsqueeze(0), [0], [0]).token_ids.tolist() == [0]


def test_reset_forgets_all_slots():
    world = World(1, 64)
    world.admit(0, Row(LOGITS, {"presence_penalty": 1.0}))
    world.samplers[0].reset()
    with pytest.raises(ValueError, match="were not admitted"):
        world.sample(LOGITS.unsqueeze(0), [0], [0])


def test_sampling_works_inside_and_outside_of_inference_mode():
    """Counts made in inference mode must be changeable outside of it."""
    world = World(1, 64)
    with torch.inference_mode():
        world.admit(0, Row(LOGITS, {"presence_penalty": 50.0}))
        world.sample(LOGITS.unsqueeze(0), [0], [0])
    assert world.sample(LOGITS.unsqueeze(0), [0], [1]).token_ids.tolist() == [1]


def test_the_tiniest_temperature_keeps_scores_finite():
    world = World(1, 64)
    world.samplers[0].admit(0, slot_sampling(temperature=1e-300, seed=4), [], [])
    assert world.sample(LOGITS.unsqueeze(0) * 100, [0], [0]).token_ids.tolist() == [0]

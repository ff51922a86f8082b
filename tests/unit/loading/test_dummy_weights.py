"""Dummy weights: the documented function, the same for any shard, and usable with transformers."""

import hashlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checkpoints import ARCHITECTURES, BASE, random_model
from support.lockstep import LockstepWorld
from support.shards import PagedSequences, dummy_shard
from tpmodel_worker.loading import dummy
from tpmodel_worker.loading.dummy import dummy_tensor, fill_dummy
from tpmodel_worker.models.config import parse_model_config


def documented(seed: int, name: str, shape: tuple[int, ...], index: int) -> float:
    """The module's documentation, in Python's integers."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    state = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    state ^= state >> 31
    k = (state >> 40) - 2**23
    if len(shape) == 1:
        return 1 + (k // 2**8) / 2**18
    return k * 2.0 ** round(math.log2(math.sqrt(3 / shape[-1]))) / 2**23


@given(st.integers(0, 2**64 - 1), st.sampled_from([(5, 7), (1, 3), (11,), (3, 64), (2, 3, 5)]))
def test_values_are_the_documented_function(seed, shape):
    values = dummy_tensor(seed, "some.weight", shape).flatten().tolist()
    assert values == [documented(seed, "some.weight", shape, index) for index in range(math.prod(shape))]


@settings(deadline=None)
@given(st.data())
def test_a_part_is_a_slice_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dimension] - 1))
    length = data.draw(st.integers(1, shape[dimension] - start))
    whole = dummy_tensor(3, "w", shape)
    part = torch.full_like(whole, torch.nan).narrow(dimension, start, length)
    fill_dummy(part, 3, "w", shape, dimension=dimension, start=start)
    assert torch.equal(part, whole.narrow(dimension, start, length))


@pytest.mark.parametrize("shape", [(50, 30), (3, 7, 30), (40, 2, 5)])
def test_chunks_do_not_change_the_values(monkeypatch, shape):
    whole = dummy_tensor(1, "w", shape)
    monkeypatch.setattr(dummy, "CHUNK_ELEMENTS", 70)
    assert torch.equal(dummy_tensor(1, "w", shape), whole)


def test_seed_and_name_matter():
    base = dummy_tensor(1, "a", (8, 8))
    assert not torch.equal(base, dummy_tensor(2, "a", (8, 8)))
    assert not torch.equal(base, dummy_tensor(1, "b", (8, 8)))


def test_values_are_uniform_and_norms_near_one():
    values = dummy_tensor(0, "w", (1000, 192))
    assert values.abs().max() <= 0.125
    assert abs(float(values.mean())) < 1e-3
    assert float(values.std()) == pytest.approx(0.125 / math.sqrt(3), rel=0.01)
    norms = dummy_tensor(0, "norm", (4096,))
    assert 0.875 <= float(norms.min()) < 0.88
    assert 1.12 < float(norms.max()) < 1.125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_rounded_values(dtype):
    assert torch.equal(dummy_tensor(5, "w", (33, 65), dtype), dummy_tensor(5, "w", (33, 65)).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3000, 1031), (4097,)])
def test_cuda_gives_the_same_bits(shape, dtype):
    assert torch.equal(dummy_tensor(9, "w", shape, dtype, "cuda").cpu(), dummy_tensor(9, "w", shape, dtype))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "architecture", [{"model_type": "qwen3"}, *ARCHITECTURES.values()], ids=["qwen3", *ARCHITECTURES]
)
def test_they_fill_a_transformers_model_that_answers_alike(architecture, world_size):
    changes: dict[str, Any] = {"vocab_size": 523, "num_key_value_heads": 2}
    if "text_config" in architecture:
        shape = architecture | {"text_config": architecture["text_config"] | changes}
    else:
        shape = BASE | architecture | changes
    theirs = random_model(**shape).eval()
    with torch.inference_mode():
        for name, parameter in theirs.named_parameters():
            if "visual" not in name:
                parameter.copy_(dummy_tensor(7, name, parameter.shape))
    config = parse_model_config(shape, world_size=world_size)
    prompt = torch.randint(0, 523, (60,), generator=torch.Generator().manual_seed(1))

    def run(communicator):
        paged = PagedSequences(dummy_shard(config, communicator, seed=7), 1, max_length=64)
        return paged.step([(0, prompt.tolist())])[0]

    logits = torch.cat(LockstepWorld(world_size).run(run), dim=1)[:, :523]
    with torch.inference_mode():
        expected = theirs(prompt.unsqueeze(0)).logits[0]
    # Float32's error grows in the hybrid models' layers; a weight that went elsewhere gives logits of its own.
    tolerance = 1e-4 if architecture["model_type"] in ("qwen3", "qwen3_moe") else 3e-3
    assert float((logits - expected).abs().max()) < tolerance
    assert float(expected.std()) > 0.3, "weights that make all logits alike would hide errors"

"""Slots of a model with recurrent state: what one sequence leaves behind must not reach the next one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from support.checkpoints import ARCHITECTURES, make_checkpoint, random_prompts
from support.oracle import Reference, TieLedger
from support.rank_link import RankLink
from support.shards import load_shard
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.models.batch import LayerKvCache, LayerState, StateShape
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.kv_cache import KvCache, KvDemand, KvShape, StateMemory, available_blocks
from tpmodel_worker.rank.plan_check import PlanLimits
from tpmodel_worker.rank.replies import StepOutcome
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.rank.sampling import Sampler
from tpmodel_worker.rank.slots import SlotLimits, SlotTable

CPU = torch.device("cpu")
BLOCK, SLOTS, BLOCKS = 8, 3, 60
STATE = StateShape(channels=7, taps=3, value_heads=2, key_dim=4, value_dim=6)
MEMORY = StateMemory(STATE, layers=2, slots=SLOTS, dtype=torch.bfloat16)
SHAPE = KvShape(layers=1, kv_heads=1, head_dim=2, block_size=BLOCK, dtype=torch.bfloat16, states=MEMORY)
STATE_BYTES = 256 + 1280
"""Features of 2 layers, 3 slots, 3 tokens and 7 channels take 252 bytes, the recurrent state in float32 1152: each
rounded up to a multiple of 256."""


@pytest.fixture
def arenas() -> Iterator[ArenaClient]:
    # A socket's path has to be short.
    with tempfile.TemporaryDirectory(prefix="tp") as folder, RankLink(Path(folder) / "s") as link:
        with ArenaClient(link.path) as client:
            yield client


class HybridRank:
    """A runner with a hybrid model, and what it has sampled."""

    def __init__(self, checkpoint: Path, arenas: ArenaClient) -> None:
        communicator = SingleCommunicator(CPU)
        model = load_shard(checkpoint, communicator)
        assert model.state_shape is not None
        states = StateMemory(model.state_shape, sum(model.keeps_state), SLOTS, torch.float32)
        shape = KvShape(
            layers=model.keeps_state.count(False),
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            block_size=BLOCK,
            dtype=torch.float32,
            states=states,
        )
        limits = SlotLimits(max_slots=SLOTS, block_size=BLOCK, max_blocks=16, num_blocks=BLOCKS)
        self.runner = StepRunner(
            model=model,
            cache=KvCache(shape, BLOCKS, keeps_state=model.keeps_state, rank=0, device=CPU, arenas=arenas),
            slots=SlotTable(limits, CPU),
            sampler=Sampler(
                communicator,
                vocab_size=512,
                vocab_start=0,
                vocab_shard=model.vocab_shard,
                max_slots=SLOTS,
                device=CPU,
            ),
            limits=PlanLimits(limits, 512, 64, keeps_state=True),
            device=CPU,
        )
        self.sampled: dict[int, list[int]] = {}
        self._seq = 0

    @torch.inference_mode()
    def execute(self, **parts: object) -> None:
        self._seq += 1
        plan = pb.GenerateStepRequest(**parts)  # pyright: ignore[reportArgumentType]
        self.runner.execute(self._seq, plan, submit=self._submit, check=lambda: None)

    def generate(self, slot: int, prompt: Sequence[int], count: int, *, chunk: int = 64) -> list[int]:
        """Fills a slot, computes the prompt in chunks and then token by token; the slot stays filled."""
        first = slot * 16
        sampling = pb.SlotSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=count + 1, logprobs=-1)
        start = {
            "admissions": [pb.Admission(slot=slot, token_ids=prompt, prompt_length=len(prompt), sampling=sampling)],
            "block_table_deltas": [pb.BlockTableDelta(slot=slot, start=0, blocks=range(first, first + 16))],
        }
        self.sampled[slot] = []
        for begin in range(0, len(prompt), chunk):
            length = min(chunk, len(prompt) - begin)
            self.execute(**start, prefill_chunks=[pb.PrefillChunk(slot=slot, length=length)], steps=1)
            start = {}
        while len(self.sampled[slot]) < count:
            self.execute(decode_slots=[slot], steps=1)
        return self.sampled[slot]

    def _submit(self, outcome: StepOutcome) -> None:
        if outcome.sampled is not None:
            tokens, _finished, sampled = outcome.sampled.wait()
            for slot, token, active in zip(outcome.slots.tolist(), tokens, sampled, strict=True):
                if active:
                    self.sampled[slot].append(int(token))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hybrid"), **ARCHITECTURES["qwen3_5"])


PROMPTS = random_prompts(4, shortest=20, longest=90, vocabulary=512, seed=7)


def test_a_slot_that_is_filled_again_knows_nothing_of_its_last_sequence(checkpoint, arenas) -> None:
    """After a release, and in the plan of the release; also after a sequence that ended amid its prompt."""
    rank, reference, ledger = HybridRank(checkpoint, arenas), Reference(checkpoint), TieLedger()
    for prompt in PROMPTS:
        served = rank.generate(1, prompt, 12, chunk=33)
        reference.check_greedy(prompt, served, ledger, what=f"prompt of {len(prompt)}")
        rank.execute(releases=[1])
    sampling = pb.SlotSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=9, logprobs=-1)
    rank.execute(
        admissions=[pb.Admission(slot=1, token_ids=PROMPTS[0], prompt_length=len(PROMPTS[0]), sampling=sampling)],
        block_table_deltas=[pb.BlockTableDelta(slot=1, start=0, blocks=range(16, 32))],
        prefill_chunks=[pb.PrefillChunk(slot=1, length=5)],
        steps=1,
    )
    rank.execute(releases=[1])
    served = rank.generate(1, PROMPTS[1], 12)
    reference.check_greedy(PROMPTS[1], served, ledger, what="after half a prompt")


def test_the_test_above_sees_a_slot_that_is_not_reset(checkpoint, arenas, monkeypatch) -> None:
    monkeypatch.setattr(KvCache, "reset_states", lambda _self, _slots: None)
    rank, reference = HybridRank(checkpoint, arenas), Reference(checkpoint)
    rank.generate(1, PROMPTS[0], 12)
    rank.execute(releases=[1])
    served = rank.generate(1, PROMPTS[1], 12)
    with pytest.raises(AssertionError, match="transformers chooses"):
        reference.check_greedy(PROMPTS[1], served, TieLedger(), what="leak")


def test_a_slot_that_has_finished_disturbs_no_other(checkpoint, arenas) -> None:
    """It idles in the same steps, with a state of its own."""
    rank, reference, ledger = HybridRank(checkpoint, arenas), Reference(checkpoint), TieLedger()
    rank.generate(0, PROMPTS[0], 3)
    rank.generate(2, PROMPTS[2], 1)
    for _ in range(10):
        rank.execute(decode_slots=[0, 2], steps=1)
    for slot, count in ((0, 4), (2, 2)):
        assert len(rank.sampled[slot]) == count, "max_tokens ends it"
    served = rank.generate(1, PROMPTS[1], 2)
    rank.execute(decode_slots=[0, 2], steps=1)
    reference.check_greedy(PROMPTS[1], served, ledger, what="beside finished slots")


def test_layers_get_what_they_keep_and_a_reset_empties_only_its_slots(arenas) -> None:
    cache = KvCache(SHAPE, 5, keeps_state=[True, False, True], rank=0, device=CPU, arenas=arenas)
    first, attention, second = cache.layers
    assert isinstance(first, LayerState)
    assert isinstance(attention, LayerKvCache)
    assert isinstance(second, LayerState)
    assert attention.keys.shape == (6, BLOCK, 1, 2)
    for state in (first, second):
        assert (state.convolution.shape, state.convolution.dtype) == ((SLOTS, 3, 7), torch.bfloat16)
        assert (state.recurrent.shape, state.recurrent.dtype) == ((SLOTS, 2, 4, 6), torch.float32)
        state.convolution.fill_(1)
        state.recurrent.fill_(float("nan"))
    attention.keys.fill_(1)
    cache.reset_states([2, 0])
    for state in (first, second):
        for part in (state.convolution, state.recurrent):
            assert not part[[0, 2]].any()
            assert part[1].all()
    assert attention.keys.all()


def demand(**changes: int) -> KvDemand:
    numbers = {
        "kv_cache_bytes": 0,
        "max_num_seqs": SLOTS,
        "max_model_len": 64,
        "activation_bytes": 0,
        "weights_bytes": 0,
        "ranks_on_host": 1,
    }
    return KvDemand(**(numbers | changes))


def test_states_are_part_of_the_memory_that_was_asked_for() -> None:
    assert SHAPE.state_bytes == STATE_BYTES
    assert available_blocks(SHAPE, demand(kv_cache_bytes=STATE_BYTES + 10 * SHAPE.block_bytes), CPU) == 9


def test_memory_without_room_for_the_states_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError) as refusal:
        available_blocks(SHAPE, demand(kv_cache_bytes=STATE_BYTES), CPU)
    assert f"({STATE_BYTES} of them for the recurrent state of max_num_seqs = 3 sequences)" in str(refusal.value)

"""One rank of a hybrid model on the CPU, without engine and session: plans in, tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from support.shards import load_shard
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.rank.cache_sizes import KvShape
from tpmodel_worker.rank.kv_cache import KvCache
from tpmodel_worker.rank.plan_check import PlanLimits
from tpmodel_worker.rank.replies import StepOutcome
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.rank.sampling import Sampler
from tpmodel_worker.rank.slots import SlotLimits, SlotTable

CPU = torch.device("cpu")
BLOCK, SLOTS, BLOCKS, SNAPSHOTS = 8, 3, 60, 2


class HybridRank:
    """A runner with a hybrid model, and what it has sampled."""

    def __init__(self, checkpoint: Path, arenas: ArenaClient) -> None:
        communicator = SingleCommunicator(CPU)
        model = load_shard(checkpoint, communicator)
        shape = KvShape.of_model(model, block_size=BLOCK, dtype=torch.float32, slots=SLOTS, snapshots=SNAPSHOTS)
        assert shape.states is not None
        limits = SlotLimits(max_slots=SLOTS, block_size=BLOCK, max_blocks=16, num_blocks=BLOCKS, snapshots=SNAPSHOTS)
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

    def generate(
        self,
        slot: int,
        prompt: Sequence[int],
        count: int,
        *,
        chunk: int = 64,
        computed: int = 0,
        restore: int | None = None,
        save: int | None = None,
        blocks: Sequence[int] = (),
    ) -> list[int]:
        """Fills a slot, computes the prompt in chunks and then token by token; the slot stays filled.

        blocks: in place of the slot's own. restore: snapshot of the state behind the `computed` first tokens. save:
        where to copy the state to behind the first chunk.
        """
        blocks = blocks or range(slot * 16, slot * 16 + 16)
        sampling = pb.SlotSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=count + 1, logprobs=-1)
        admission = pb.Admission(
            slot=slot,
            token_ids=prompt,
            prompt_length=len(prompt),
            sampling=sampling,
            computed_length=computed,
            state_snapshot=restore,
        )
        once: dict[str, object] = {
            "admissions": [admission],
            "block_table_deltas": [pb.BlockTableDelta(slot=slot, start=0, blocks=blocks)],
            "state_saves": [] if save is None else [pb.StateSave(slot=slot, snapshot=save)],
        }
        self.sampled[slot] = []
        for begin in range(computed, len(prompt), chunk):
            length = min(chunk, len(prompt) - begin)
            self.execute(**once, prefill_chunks=[pb.PrefillChunk(slot=slot, length=length)], steps=1)
            once = {}
        while len(self.sampled[slot]) < count:
            self.execute(decode_slots=[slot], steps=1)
        return self.sampled[slot]

    def _submit(self, outcome: StepOutcome) -> None:
        if outcome.sampled is not None:
            tokens, _finished, sampled = outcome.sampled.wait()
            for slot, token, active in zip(outcome.slots.tolist(), tokens, sampled, strict=True):
                if active:
                    self.sampled[slot].append(int(token))

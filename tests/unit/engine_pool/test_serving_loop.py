"""The serving loop against a pool that is not there: order, bounds, ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from support.simulated_rank import SimulatedRank, true_outputs
from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import PoolError
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.requests import QueueFullError, Request, SchedulerConfig, SequenceOutput
from tpmodel_worker.engine.scheduler import Scheduler
from tpmodel_worker.engine.status import EngineStatus

VOCABULARY = 50
CONFIG = SchedulerConfig(
    num_blocks=32,
    block_size=4,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_model_len=64,
    queue_limit=2,
    prefix_cache=True,
)


class StandInPool:
    """Has the part of Pool that the loop uses; the test answers plans when it likes."""

    def __init__(self, wake: asyncio.Event) -> None:
        self.next_seq = 1
        self.error: PoolError | None = None
        self.outstanding: list[tuple[int, worker_pb2.GenerateStepRequest]] = []
        self.log: list[str] = []
        self.model = SimulatedRank(
            num_blocks=32, block_size=4, slots=4, max_step_tokens=64, max_len=64, vocabulary=VOCABULARY
        )
        self._wake = wake
        self._replies: list[tuple[int, worker_pb2.GenerateStepOk]] = []

    @property
    def may_send_plan(self) -> bool:
        return self.error is None and len(self.outstanding) < 2

    def send_plan(self, plan: worker_pb2.GenerateStepRequest) -> int:
        assert self.may_send_plan
        self.outstanding.append((self.next_seq, plan))
        self.log.append(f"plan {self.next_seq}")
        self.next_seq += 1
        return plan.ByteSize()

    def take_replies(self) -> list[tuple[int, worker_pb2.GenerateStepOk]]:
        replies, self._replies = self._replies, []
        return replies

    def answer(self) -> None:
        """Executes the oldest plan."""
        seq, plan = self.outstanding.pop(0)
        self._replies += [(seq, reply) for reply in self.model.execute(plan)]
        self._wake.set()

    def answer_wrongly(self) -> None:
        seq, _ = self.outstanding.pop(0)
        self._replies.append((seq, worker_pb2.GenerateStepOk(step=5)))
        self._wake.set()

    def fault(self, what: str, cause: Exception) -> None:
        self.error = PoolError(what, engine=cause)
        self._wake.set()

    async def failed(self) -> PoolError:
        assert self.error is not None
        return self.error


class Bench:
    """A running loop with everything it needs."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.pool = StandInPool(self.wake)
        self.outputs: list[SequenceOutput] = []
        self.registry = CollectorRegistry()
        self.status = EngineStatus("engine-1", 1, "model", 64)
        self.scheduler = Scheduler(CONFIG, clock=time.time, weight_version=0)
        self.loop = ServingLoop(
            self.scheduler,
            wake=self.wake,
            sink=self._take,
            status=self.status,
            metrics=EngineMetrics(self.registry),
        )
        self.running = asyncio.create_task(self.loop.run(cast("Pool", self.pool)))

    def _take(self, outputs: Sequence[SequenceOutput]) -> None:
        self.pool.log.append("outputs")
        self.outputs += outputs

    def metric(self, name: str) -> float:
        value = self.registry.get_sample_value(name)
        assert value is not None
        return value

    def tokens(self, key: int) -> list[int]:
        return [token for output in self.outputs if output.key == key for token in output.token_ids]

    async def answer_everything(self) -> None:
        """Answers plans until none is left."""
        for _ in range(200):
            await turn()
            if not self.pool.outstanding:
                return
            self.pool.answer()
        raise AssertionError("plans without end")


async def turn() -> None:
    """Lets the loop run until it waits."""
    for _ in range(3):
        await asyncio.sleep(0)


def request(key: int, *, max_tokens: int = 6, deadline: float | None = None, prompt: int = 5) -> Request:
    sampling = worker_pb2.SlotSampling(top_p=1.0, repetition_penalty=1.0, seed=key, max_tokens=max_tokens, logprobs=-1)
    prompt_ids = list(range(1, prompt + 1))
    return Request(key=key, request_id=f"r{key}", prompt_token_ids=prompt_ids, sampling=sampling, deadline=deadline)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await turn()
    yield made
    made.loop.stop()
    await made.running


async def test_request_brings_its_tokens_and_its_end(bench: Bench) -> None:
    bench.loop.submit(request(1))
    await bench.answer_everything()
    assert bench.tokens(1) == true_outputs(range(1, 6), request(1).sampling, VOCABULARY)
    assert bench.outputs[-1].finish_reason
    assert await bench.loop.idle(0.1)


async def test_two_plans_are_sent_before_any_reply(bench: Bench) -> None:
    bench.loop.submit(request(1))
    await turn()
    assert [seq for seq, _ in bench.pool.outstanding] == [1, 2]
    assert not await bench.loop.idle(0.01)


async def test_next_plan_goes_out_before_outputs_are_handed_on(bench: Bench) -> None:
    bench.loop.submit(request(1))
    await turn()
    bench.pool.log.clear()
    bench.pool.answer()
    await turn()
    assert bench.pool.log == ["plan 3", "outputs"]


async def test_arriving_request_is_in_the_next_plan_made(bench: Bench) -> None:
    bench.loop.submit(request(1, max_tokens=50))
    await turn()
    bench.loop.submit(request(2))
    bench.pool.answer()
    await turn()
    _, newest = bench.pool.outstanding[-1]
    assert [admission.sampling.seed for admission in newest.admissions] == [2]


async def test_cancel_releases_with_the_next_plan_and_brings_no_output(bench: Bench) -> None:
    bench.loop.submit(request(1, max_tokens=50))
    await turn()
    assert bench.loop.cancel(1)
    bench.pool.answer()
    await turn()
    _, newest = bench.pool.outstanding[-1]
    assert list(newest.releases) == [0]
    await bench.answer_everything()
    assert bench.tokens(1) == []
    assert not bench.loop.cancel(1)


async def test_deadline_ends_a_request_that_waits_without_any_reply(bench: Bench) -> None:
    bench.loop.submit(request(1, deadline=time.time() + 0.05))
    await turn()
    await asyncio.sleep(0.1)
    error = bench.outputs[-1].error
    assert error is not None
    assert error[0] == 4


async def test_refused_request_raises_and_is_not_counted(bench: Bench) -> None:
    bench.loop.submit(request(1))
    bench.loop.submit(request(2))
    with pytest.raises(QueueFullError):
        bench.loop.submit(request(3))
    assert bench.metric("tpmodel_prompt_tokens_total") == 10


async def test_answer_that_fits_no_plan_is_a_fault(bench: Bench) -> None:
    bench.loop.submit(request(1))
    await turn()
    bench.pool.answer_wrongly()
    await asyncio.wait_for(bench.running, 1.0)
    assert "does not fit" in str(bench.pool.error)


async def test_fault_of_the_pool_ends_the_loop_and_requests_fail_when_told(bench: Bench) -> None:
    bench.loop.submit(request(1))
    await turn()
    bench.pool.fault("rank 1 died", RuntimeError("x"))
    await asyncio.wait_for(bench.running, 1.0)
    bench.loop.fail_all("world lost")
    assert bench.outputs[-1].error == (14, "world lost")


async def test_counters_and_metrics_follow(bench: Bench) -> None:
    bench.loop.submit(request(1, max_tokens=50))
    await turn()
    await asyncio.sleep(0.15)
    assert bench.status.state.running == 1
    assert bench.status.state.kv_blocks_used > 0
    assert bench.metric("tpmodel_requests_running") == 1
    assert bench.metric("tpmodel_kv_cache_usage_ratio") > 0
    await bench.answer_everything()
    await asyncio.sleep(0.15)
    assert bench.status.state.running == 0
    assert bench.metric("tpmodel_generated_tokens_total") == len(bench.tokens(1)) == 50
    assert bench.metric("tpmodel_step_seconds_count") >= 50
    assert bench.metric("tpmodel_plan_seconds_count") == bench.metric("tpmodel_plan_bytes_count") > 0

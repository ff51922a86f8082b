"""What a weight update does to the requests that the scheduler has."""

from __future__ import annotations

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.requests import Request, SchedulerConfig
from tpmodel_worker.engine.scheduler import Scheduler

BLOCK = 4
PROMPT = list(range(10, 19))
CONFIG = SchedulerConfig(
    num_blocks=64,
    block_size=BLOCK,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_model_len=64,
    queue_limit=8,
    prefix_cache=True,
    max_steps=1,
)


class Engine:
    """A scheduler whose ranks answer every plan with token 7."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(CONFIG, clock=lambda: 1000.0, weight_version=3)
        self.seq = 0

    def submit(self, key: str, priority: int = 0) -> None:
        sampling = worker_pb2.SlotSampling(max_tokens=40, logprobs=-1)
        request = Request(key=key, request_id=key, prompt_token_ids=PROMPT, sampling=sampling, priority=priority)
        self.scheduler.submit(request)

    def plan(self) -> worker_pb2.GenerateStepRequest | None:
        """One plan, answered."""
        self.seq += 1
        plan = self.scheduler.next_plan(self.seq)
        if plan is None:
            return None
        slots = sorted([*plan.decode_slots, *(chunk.slot for chunk in plan.prefill_chunks)])
        reply = worker_pb2.GenerateStepOk(
            slots=slots, token_ids=[7] * len(slots), finished=[worker_pb2.FINISHED_UNSPECIFIED] * len(slots)
        )
        self.outputs = self.scheduler.take_outputs() + self.scheduler.commit(self.seq, reply)
        return plan

    def versions(self) -> list[int]:
        """Of the admissions among the outputs since the last call."""
        outputs = [*self.outputs, *self.scheduler.take_outputs()]
        self.outputs = []
        return [output.admitted.weight_version for output in outputs if output.admitted is not None]


def test_live_requests_go_on_behind_their_tokens_and_are_said_to_be_at_the_new_version() -> None:
    """E46, U35: everything that was computed with the old weights is computed again."""
    engine = Engine()
    engine.submit("a")
    for _ in range(3):
        engine.plan()
    assert engine.versions() == []
    engine.scheduler.adopt_weights(4)
    assert engine.versions() == [4]
    plan = engine.plan()
    assert plan is not None
    (admission,) = plan.admissions
    assert list(admission.token_ids) == [*PROMPT, 7, 7, 7]
    assert (admission.prompt_length, admission.computed_length) == (len(PROMPT), 0)
    # It had been admitted before: nobody is told again.
    assert engine.versions() == []


def test_the_prefix_cache_never_gives_kv_of_other_weights() -> None:
    engine = Engine()
    engine.submit("a")
    for _ in range(3):
        engine.plan()
    engine.scheduler.cancel("a")
    engine.submit("b")
    plan = engine.plan()
    assert plan is not None
    assert plan.admissions[0].computed_length == 2 * BLOCK
    engine.scheduler.cancel("b")
    engine.scheduler.adopt_weights(4)
    engine.submit("c")
    plan = engine.plan()
    assert plan is not None
    assert plan.admissions[0].computed_length == 0
    assert engine.versions() == [4]


def test_while_admission_is_closed_only_what_had_come_before_goes_on() -> None:
    engine = Engine()
    engine.submit("early")
    engine.plan()
    engine.submit("queued")
    last = engine.scheduler.close_admission()
    engine.submit("late", priority=-1)
    plan = engine.plan()
    assert plan is not None
    assert len(plan.admissions) == 1
    assert engine.scheduler.running == 2
    assert engine.scheduler.has_work_before(last)
    engine.scheduler.cancel("early")
    engine.scheduler.cancel("queued")
    assert not engine.scheduler.has_work_before(last)
    engine.plan()
    assert engine.plan() is None
    engine.scheduler.open_admission()
    plan = engine.plan()
    assert plan is not None
    assert len(plan.admissions) == 1

"""What a plan costs the engine's scheduler: next_plan, its bytes, and the commits of all its steps, in microseconds.

Requests decode steadily (no arrivals, nothing ends), which is what a busy server does in most steps.
Run with `python -m benchmarks.scheduler`.
"""

from __future__ import annotations

import time
from statistics import median

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.requests import Request, SchedulerConfig
from tpmodel_worker.engine.scheduler import Scheduler

BATCH_SIZES = (1, 16, 64, 256)
PLANS = 400
PROMPT_TOKENS = 128
BLOCK_SIZE = 16


def start(batch_size: int, steps: int) -> Scheduler:
    """A scheduler whose batch_size requests are admitted and have prefilled."""
    max_model_len = PROMPT_TOKENS + (PLANS + 10) * steps
    config = SchedulerConfig(
        num_blocks=batch_size * (max_model_len // BLOCK_SIZE + 2),
        block_size=BLOCK_SIZE,
        max_num_seqs=batch_size,
        max_num_batched_tokens=batch_size * PROMPT_TOKENS,
        max_model_len=max_model_len,
        queue_limit=batch_size,
        prefix_cache=True,
        max_steps=steps,
    )
    scheduler = Scheduler(config, clock=time.time, weight_version=1)
    for index in range(batch_size):
        prompt = [index * PROMPT_TOKENS + position for position in range(PROMPT_TOKENS)]
        sampling = worker_pb2.SlotSampling(top_p=1, repetition_penalty=1, logprobs=-1)
        scheduler.submit(Request(key=index, request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
    return scheduler


def answer(batch_size: int, steps: int) -> list[worker_pb2.GenerateStepOk]:
    """Rank 0's replies to one plan."""
    slots = list(range(batch_size))
    goes_on = [worker_pb2.FINISHED_UNSPECIFIED] * batch_size
    return [
        worker_pb2.GenerateStepOk(step=step, slots=slots, token_ids=slots, finished=goes_on, seconds=0.0001)
        for step in range(steps)
    ]


def measure(batch_size: int, steps: int) -> tuple[float, float, float, int]:
    """Medians over plans: seconds of next_plan, of SerializeToString, of all commits; and the bytes of a plan."""
    scheduler = start(batch_size, steps)
    planning, serializing, committing, sizes = [], [], [], []
    for seq in range(1, PLANS):
        begin = time.perf_counter()
        plan = scheduler.next_plan(seq)
        planned = time.perf_counter()
        assert plan is not None
        sizes.append(len(plan.SerializeToString()))
        serialized = time.perf_counter()
        scheduler.take_outputs()
        replies = answer(batch_size, plan.steps)
        before_commits = time.perf_counter()
        for reply in replies:
            scheduler.commit(seq, reply)
        committed = time.perf_counter()
        if plan.steps == steps and not plan.prefill_chunks:
            planning.append(planned - begin)
            serializing.append(serialized - planned)
            committing.append(committed - before_commits)
    return median(planning), median(serializing), median(committing), int(median(sizes))


def main() -> None:
    """Prints one row for each batch size and number of steps."""
    print("batch steps  next_plan  serialize    commits  each step  plan bytes")
    for steps in (1, 8):
        for batch_size in BATCH_SIZES:
            plan, serialize, commits, size = measure(batch_size, steps)
            times = (plan, serialize, commits, (plan + serialize + commits) / steps)
            columns = "".join(f" {1e6 * seconds:>10.1f}" for seconds in times)
            print(f"{batch_size:>5} {steps:>5}{columns} {size:>11}")


if __name__ == "__main__":
    main()

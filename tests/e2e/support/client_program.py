"""What runs in client pods: a user's program on the project's own client. Needs nothing else of the repository.

    python client_program.py complete < one JSON object: target, prompts, options
    python client_program.py load '<JSON object: see load()>'    until its input ends

Every line of output is one JSON object.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tpmodel import AsyncClient, TpmodelError
from tpmodel.channel import RetryPolicy

PROMPT = [11, 42, 7, 99]
CONNECT_SECONDS = 1.0
"""For connections to all gangs."""
LONGEST = 600.0
"""Seconds; a stream that hangs ends as an error."""


@dataclass
class Record:
    """One request of a load."""

    number: int
    began: float
    first_token: float | None = None
    ended: float = 0.0
    tokens: int = 0
    tries_before: int = 0
    """Tries again before the first token: where a server refused, the client went to another."""
    cuts: int = 0
    """Times that a server went away in mid-stream, and the client resumed elsewhere."""
    error: str = ""


CURRENT: contextvars.ContextVar[Record] = contextvars.ContextVar("CURRENT")


@dataclass(frozen=True, slots=True)
class CountedRetries(RetryPolicy):
    """The client's usual retries, each noted in the request that it belongs to: they would hide what went wrong."""

    def delays(self) -> Iterator[float]:
        for delay in RetryPolicy.delays(self):
            record = CURRENT.get()
            if record.first_token is None:
                record.tries_before += 1
            else:
                record.cuts += 1
            yield delay


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def complete(target: str, prompts: list[list[int]], options: dict[str, Any], together: int = 8) -> None:
    """Says each prompt's answer; `together` at a time."""
    room = asyncio.Semaphore(together)

    async def one(client: AsyncClient, number: int, prompt: list[int]) -> None:
        async with room:
            result = await client.complete(prompt, timeout=120, **options)
        say(number=number, token_ids=list(result.token_ids[0]))

    async with AsyncClient(target) as client, asyncio.TaskGroup() as group:
        for number, prompt in enumerate(prompts):
            group.create_task(one(client, number, prompt))


async def load(target: str, streams: int, tokens: int, seconds: float, pause: float) -> None:
    """Keeps so many streams open until the input ends; those that run then are left at their next token.

    Args:
        target: what to dial.
        streams: how many are open at a time.
        tokens: length of each answer.
        seconds: a stream that still runs after so long is left at its next token: it is alive, and has been all along.
            One that is not alive is never left, and fails.
        pause: before the next stream, when one has ended.
    """
    stopped = asyncio.Event()

    async def listen() -> None:
        await asyncio.to_thread(sys.stdin.read)
        stopped.set()

    async def keep_one_open(client: AsyncClient, numbers: Iterator[int]) -> None:
        while not stopped.is_set():
            await stream(client, Record(next(numbers), time.time()), tokens, seconds, stopped)
            await asyncio.sleep(pause)

    numbers = iter(range(sys.maxsize))
    async with AsyncClient(target, retry=CountedRetries()) as client, asyncio.TaskGroup() as group:
        # The first gang that is connected to would get all first streams.
        await client.model_info()
        await asyncio.sleep(CONNECT_SECONDS)
        group.create_task(listen())
        for _ in range(streams):
            group.create_task(keep_one_open(client, numbers))


async def stream(client: AsyncClient, record: Record, tokens: int, seconds: float, stopped: asyncio.Event) -> None:
    """One request, from a line that says it has begun to one that says how it ended."""
    CURRENT.set(record)
    running = client.generate(PROMPT, max_tokens=tokens, ignore_eos=True, temperature=0, timeout=LONGEST)
    try:
        async for chunk in running:
            record.tokens += len(chunk.token_ids)
            if record.first_token is None:
                record.first_token = time.time()
                say(event="begun", number=record.number, at=record.first_token)
            if stopped.is_set() or time.time() - record.first_token > seconds:
                running.cancel()
                break
    except TpmodelError as error:
        record.error = str(error)
    record.ended = time.time()
    say(event="ended", **dataclasses.asdict(record))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["complete"]:
            asyncio.run(complete(**json.load(sys.stdin)))
        case ["load", arguments]:
            asyncio.run(load(**json.loads(arguments)))
        case _:
            sys.exit(__doc__)

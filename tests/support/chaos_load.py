"""Continuous load through the Python client, and the oracle: what every stream must bring, whatever fails."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tpmodel import Client, DeadlineExceededError, TpmodelError
from tpmodel.channel import RetryPolicy

PATIENCE = RetryPolicy(window=120.0, first_delay=0.05, longest_delay=0.5)
STREAM_SECONDS = 150.0
_JOIN_SECONDS = STREAM_SECONDS + 30.0


@dataclass(slots=True)
class Request:
    """One of those that are sent again and again."""

    name: str
    prompt: list[int]
    options: dict[str, Any]
    token_ids: tuple[tuple[int, ...], ...] = ()
    """What it brings undisturbed, by sample."""
    texts: tuple[str, ...] = ()


@dataclass(slots=True)
class Lane:
    """One thread of the load, and the stream that it reads now."""

    last_token: float = 0.0
    """When a token came last (monotonic)."""


@dataclass(slots=True)
class Tally:
    """What the streams came to."""

    whole: int = 0
    past_deadline: int = 0
    tokens: int = 0
    violations: list[str] = field(default_factory=list)


def make_requests(seed: int, count: int, *, vocabulary: int, tokens: int) -> list[Request]:
    """Greedy and seeded ones, with and without truncation and penalties, some with two samples."""
    rng = random.Random(seed)
    requests = []
    for index in range(count):
        options: dict[str, Any] = {"max_tokens": rng.randint(tokens // 4, tokens), "ignore_eos": True}
        if index % 2:
            options |= {"temperature": 0.9, "seed": rng.randrange(2**32)}
            options |= [{}, {"top_p": 0.9}, {"top_k": 30, "presence_penalty": 0.4}, {"n": 2}][index // 2 % 4]
        else:
            options["temperature"] = 0.0
        prompt = [rng.randrange(2, vocabulary) for _ in range(rng.randint(2, 90))]
        requests.append(Request(f"request {index} ({options})", prompt, options))
    return requests


class Load:
    """Threads that send the requests until they are told to pause."""

    def __init__(self, target: str, requests: Sequence[Request], *, lanes: int, seed: int) -> None:
        """lanes: streams at a time; the last of them sets deadlines that faults make it miss."""
        self._target = target
        self._requests = list(requests)
        self._seed = seed
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._rounds = 0
        self.lanes = [Lane() for _ in range(lanes)]
        self.tally = Tally()

    def learn(self) -> None:
        """Runs every request undisturbed, one after the other, and remembers what it brings."""
        with Client(self._target, retry=PATIENCE) as client:
            for request in self._requests:
                result = client.complete(request.prompt, timeout=STREAM_SECONDS, **request.options)
                request.token_ids, request.texts = result.token_ids, result.texts

    def start(self) -> None:
        """Begins to send."""
        self._rounds += 1
        self._stop.clear()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(index, random.Random(f"{self._seed} {self._rounds} {index}")),
                daemon=True,
            )
            for index in range(len(self.lanes))
        ]
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Lets every stream come to its end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                raise AssertionError(f"a stream has neither ended nor failed within {_JOIN_SECONDS:.0f} s")
        self._threads = []

    def stop(self) -> None:
        """Begins no further stream; those under way end by themselves, or with the server."""
        self._stop.set()

    def check(self) -> None:
        """Fails where a stream has brought something else than undisturbed."""
        assert self.tally.violations == [], "\n".join(self.tally.violations[:5])

    def flows(self, since: float) -> bool:
        """Whether every lane that sets no deadlines has had a token since then (monotonic)."""
        return all(lane.last_token > since for lane in self.lanes[:-1])

    def _run(self, index: int, rng: random.Random) -> None:
        with Client(self._target, retry=PATIENCE) as client:
            while not self._stop.is_set():
                hurried = index == len(self.lanes) - 1 and rng.random() < 0.7
                timeout = rng.uniform(0.3, 3.0) if hurried else STREAM_SECONDS
                self._stream(client, self.lanes[index], rng.choice(self._requests), timeout)

    def _stream(self, client: Client, lane: Lane, request: Request, timeout: float) -> None:
        received: list[list[int]] = [[] for _ in request.token_ids]
        started = time.monotonic()
        try:
            stream = client.generate(request.prompt, timeout=timeout, **request.options)
            for chunk in stream:
                received[chunk.sample_index].extend(chunk.token_ids)
                lane.last_token = time.monotonic()
            result = stream.result()
        except DeadlineExceededError as error:
            self._count_late(request, received, time.monotonic() - started, timeout, error)
            return
        except TpmodelError as error:
            self._violate(f"{request.name}: {type(error).__name__} after {time.monotonic() - started:.1f} s: {error}")
            return
        if result.token_ids != request.token_ids or [list(ids) for ids in result.token_ids] != received:
            self._violate(f"{request.name}: {_difference(request.token_ids, received)}")
        elif result.texts != request.texts:
            self._violate(f"{request.name}: same tokens, other text")
        with self._lock:
            self.tally.whole += 1
            self.tally.tokens += sum(map(len, received))

    def _count_late(
        self, request: Request, received: list[list[int]], seconds: float, timeout: float, error: TpmodelError
    ) -> None:
        # The client gives up earlier where its pause before the next try would outlast the deadline.
        if timeout == STREAM_SECONDS or timeout - seconds > PATIENCE.longest_delay * 1.25:
            self._violate(f"{request.name}: {error} after {seconds:.1f} s of {timeout:.1f}")
        for expected, ids in zip(request.token_ids, received, strict=True):
            if list(expected[: len(ids)]) != ids:
                self._violate(f"{request.name}: until its deadline {_difference(request.token_ids, received)}")
        with self._lock:
            self.tally.past_deadline += 1
            self.tally.tokens += sum(map(len, received))

    def _violate(self, what: str) -> None:
        with self._lock:
            self.tally.violations.append(what)


def _difference(expected: Sequence[Sequence[int]], received: Sequence[Sequence[int]]) -> str:
    for sample, (wanted, got) in enumerate(zip(expected, received, strict=True)):
        for position, (left, right) in enumerate(zip(wanted, got, strict=False)):
            if left != right:
                around = slice(max(0, position - 3), position + 4)
                return f"sample {sample} at {position}: {list(got[around])} instead of {list(wanted[around])}"
        if len(got) != len(wanted):
            return f"sample {sample} has {len(got)} tokens instead of {len(wanted)}"
    return "the chunks are not the result"

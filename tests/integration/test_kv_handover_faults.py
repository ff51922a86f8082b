"""Handovers that fail on the way: an error in time, all blocks back on both sides, and both gangs serve on."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from support.checkpoints import make_checkpoint, random_prompts
from support.handover import (
    all_blocks_back,
    blocks_used,
    hand_over,
    make_server,
    pid_of,
    start_all,
    status,
    stop_all,
)
from support.kv_peers import Fetching, Keeper, layout_of
from support.waiting import until
from tpmodel import Client, Result, TpmodelError, UnavailableError
from tpmodel.channel import RetryPolicy
from tpmodel.local import LocalServer
from tpmodel.types import Kept
from tpmodel_worker.kv.pipe import KvPipeError

TOKENS = 16
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": TOKENS}
PROMPT, OTHER = random_prompts(2, shortest=60, longest=80, vocabulary=512, seed=5)
DEADLINE = 5
KEEP = 6.0
IN_TIME = 30.0
"""What a busy machine may add to a deadline."""


@dataclass(frozen=True)
class Pair:
    """Two gangs of two ranks; the second one also fetches from a stand-in."""

    prefill: LocalServer
    decode: LocalServer
    keeper: Keeper
    checkpoint: Path

    def keep(self, seconds: float = KEEP) -> Result:
        with Client(self.prefill.target) as client:
            return client.complete(PROMPT, keep_kv=seconds, **GREEDY)

    def fetching(self, first: Result, **changes: Any) -> Fetching:
        """A stand-in that fetches."""
        assert first.completion.kept is not None
        layout = changes.pop("layout", layout_of(self.checkpoint))
        return Fetching(self.prefill, first.completion.kept.ticket, [*PROMPT, *first.token_ids[0]], layout, **changes)

    def from_keeper(self) -> Continued:
        """A request of the second gang, whose KV the stand-in says to have."""
        first = self.keep(0.1)
        completion = dataclasses.replace(first.completion, kept=Kept(self.keeper.target, "any"))
        return Continued(self.decode, dataclasses.replace(first, completion=completion))

    def whole(self) -> tuple[int, ...]:
        with Client(self.prefill.target) as client:
            return client.complete(PROMPT, **GREEDY).token_ids[0]

    def both_serve(self) -> None:
        """With all blocks back, requests are answered as ever, and handed over."""
        all_blocks_back(self.prefill, self.decode)
        _, rest = hand_over(self.prefill, self.decode, PROMPT, **GREEDY)
        assert rest.token_ids[0] == self.whole()
        all_blocks_back(self.prefill, self.decode)


class Continued:
    """A request that continues another one, in a thread of its own."""

    def __init__(self, server: LocalServer, first: Result) -> None:
        self.result: Result | None = None
        self.error: TpmodelError | None = None
        self._client = Client(server.target, retry=RetryPolicy(window=0.0))
        self._stream = self._client.generate(PROMPT, continues=first, **GREEDY)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._stream.result()
        except TpmodelError as error:
            self.error = error

    def cancel(self) -> None:
        self._stream.cancel()

    def end(self, seconds: float = 60.0) -> Continued:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "it does not end"
        self._client.close()
        return self


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("handover-faults")
    checkpoint = make_checkpoint(folder / "checkpoint")
    keeper = Keeper()
    prefill = make_server(folder, checkpoint, 2, options=["--kv-transfer-deadline", str(DEADLINE)])
    options = ["--kv-transfer-deadline", str(DEADLINE), "--kv-from", keeper.target]
    decode = make_server(folder, checkpoint, 2, prefill, options=options)
    try:
        start_all([prefill, decode])
        yield Pair(prefill, decode, keeper, checkpoint)
    finally:
        stop_all([server for server in (prefill, decode) if server.output])
        keeper.stop()


def epoch(server: LocalServer) -> int:
    return status(server).engine.epoch


class TestTheGangThatKeeps:
    def test_a_receiver_that_dies_amid_the_transfer_leaves_it_unharmed(self, pair: Pair) -> None:
        """The call says so, what is kept stays, and the next one gets it."""
        before = epoch(pair.prefill)
        first = pair.keep(60.0)
        with pair.fetching(first) as fetching:
            pipes = fetching.connect()
            assert all(pipe.receive() is not None for pipe in pipes)
            with Client(pair.prefill.target) as client:
                assert len(client.complete(OTHER, **GREEDY).token_ids[0]) == TOKENS, "its other requests go on"
            started = time.monotonic()
            pipes[1].abort("killed")
            code, message = fetching.refusal()
        assert time.monotonic() - started < IN_TIME
        assert code is grpc.StatusCode.ABORTED
        assert "rank 1" in message
        until(lambda: blocks_used(pair.prefill) > 0, "its blocks are held")
        assert Continued(pair.decode, first).end().result is not None
        all_blocks_back(pair.prefill)
        assert epoch(pair.prefill) == before
        pair.both_serve()

    def test_a_receiver_that_takes_nothing_more_is_given_up_at_the_deadline(self, pair: Pair) -> None:
        first = pair.keep()
        with pair.fetching(first) as fetching:
            fetching.connect()
            started = time.monotonic()
            code, message = fetching.refusal()
        assert DEADLINE - 1 < time.monotonic() - started < DEADLINE + IN_TIME
        assert code is grpc.StatusCode.ABORTED
        assert f"{DEADLINE} s" in message
        pair.both_serve()

    def test_a_caller_that_goes_away_amid_the_transfer_leaves_nothing_behind(self, pair: Pair) -> None:
        first = pair.keep()
        with pair.fetching(first) as fetching:
            pipes = fetching.connect()
            until(lambda: blocks_used(pair.prefill) > 0, "its blocks are held")
            fetching.call.cancel()
            all_blocks_back(pair.prefill)
            for pipe in pipes:
                # The second one was not asked for.
                with pytest.raises(KvPipeError):
                    [pipe.receive() for _ in range(2)]
        pair.both_serve()

    def test_with_one_of_its_ranks_killed_the_transfer_ends_and_its_world_is_rebuilt(self, pair: Pair) -> None:
        before = epoch(pair.prefill)
        first = pair.keep(60.0)
        with pair.fetching(first) as fetching:
            pipes = fetching.connect()
            assert all(pipe.receive() is not None for pipe in pipes)
            started = time.monotonic()
            os.kill(pid_of(pair.prefill, "rank 1"), signal.SIGKILL)
            code, _ = fetching.refusal()
            assert code in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)
            with pytest.raises(KvPipeError):
                [pipes[1].receive() for _ in range(3)]
            assert time.monotonic() - started < IN_TIME
        until(lambda: epoch(pair.prefill) > before, "the next world")
        all_blocks_back(pair.prefill)
        with Client(pair.decode.target) as client, pytest.raises(TpmodelError, match="nothing is kept") as caught:
            client.complete(PROMPT, continues=first, **GREEDY)
        assert caught.value.code == "NOT_FOUND"
        pair.both_serve()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dtype": "bfloat16"}, "dtype: the gang that keeps the KV has 'float32', the one that asks 'bfloat16'"),
            ({"layers": 5}, "layers: the gang that keeps the KV has 3, the one that asks 5"),
            ({"model_id": "other"}, "model_id: the gang that keeps the KV has 'checkpoint', the one that asks 'other'"),
        ],
    )
    def test_a_gang_that_differs_is_refused_naming_both_values(
        self, pair: Pair, changes: dict[str, Any], message: str
    ) -> None:
        """Before a byte moves."""
        first = pair.keep(1.0)
        with pair.fetching(first, layout=layout_of(pair.checkpoint, **changes)) as fetching:
            assert fetching.refusal() == (grpc.StatusCode.FAILED_PRECONDITION, message)

    def test_other_weights_are_refused_naming_both_versions(self, pair: Pair) -> None:
        with pair.fetching(pair.keep(1.0), weight_version=7) as fetching:
            code, message = fetching.refusal()
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert message == "weight version: the gang that keeps the KV has 0, the one that asks 7"

    def test_a_caller_without_the_token_gets_nothing(self, pair: Pair) -> None:
        with pair.fetching(pair.keep(1.0), token="another") as fetching:
            assert fetching.refusal()[0] is grpc.StatusCode.UNAUTHENTICATED

    def test_two_can_not_fetch_at_the_same_time(self, pair: Pair) -> None:
        first = pair.keep()
        with pair.fetching(first) as fetching:
            fetching.connect()
            with pair.fetching(first) as second:
                assert second.refusal() == (grpc.StatusCode.ABORTED, "it is being fetched already")
        all_blocks_back(pair.prefill)


class TestTheGangThatContinues:
    def test_a_sender_that_dies_amid_the_transfer_fails_the_request_alone(self, pair: Pair) -> None:
        before = epoch(pair.decode)
        request = pair.from_keeper()
        serving = pair.keeper.next_call()
        serving.send_layer()
        until(lambda: blocks_used(pair.decode) > 0, "its blocks are held")
        with Client(pair.decode.target) as client:
            assert len(client.complete(OTHER, **GREEDY).token_ids[0]) == TOKENS, "its other requests go on"
        started = time.monotonic()
        serving.die()
        error = request.end().error
        assert time.monotonic() - started < IN_TIME
        assert isinstance(error, UnavailableError)
        assert pair.keeper.target in error.message
        assert epoch(pair.decode) == before
        pair.both_serve()

    def test_a_sender_that_says_nothing_more_is_given_up_at_the_deadline(self, pair: Pair) -> None:
        request = pair.from_keeper()
        serving = pair.keeper.next_call()
        serving.send_layer()
        started = time.monotonic()
        error = request.end().error
        assert DEADLINE - 1 < time.monotonic() - started < DEADLINE + IN_TIME
        assert isinstance(error, UnavailableError)
        assert serving.gone.wait(10), "the other gang hears of it"
        pair.both_serve()

    def test_a_sender_that_sends_something_else_is_refused(self, pair: Pair) -> None:
        request = pair.from_keeper()
        serving = pair.keeper.next_call()
        for pipe in serving.pipes:
            pipe.send(torch.zeros(2, 3))
        error = request.end().error
        assert isinstance(error, UnavailableError)
        assert "the peer sent torch.float32 of shape (2, 3), expected torch.float32 of shape" in error.message
        pair.both_serve()

    def test_a_client_that_goes_away_amid_the_transfer_leaves_nothing_behind(self, pair: Pair) -> None:
        request = pair.from_keeper()
        serving = pair.keeper.next_call()
        serving.send_layer()
        until(lambda: blocks_used(pair.decode) > 0, "its blocks are held")
        request.cancel()
        request.end()
        assert serving.gone.wait(IN_TIME), "the other gang hears of it"
        pair.both_serve()

    def test_with_one_of_its_ranks_killed_the_request_goes_on_in_the_next_world(self, pair: Pair) -> None:
        """Computed from its prompt; the other gang hears that it is not fetched any more."""
        before = epoch(pair.decode)
        request = pair.from_keeper()
        serving = pair.keeper.next_call()
        serving.send_layer()
        os.kill(pid_of(pair.decode, "rank 1"), signal.SIGKILL)
        assert serving.gone.wait(IN_TIME)
        result = request.end().result
        assert result is not None
        assert result.token_ids[0] == pair.whole()
        assert epoch(pair.decode) > before
        pair.both_serve()

"""Requests that one gang prefills and another one continues: real servers, their ranks' caches, the same tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import ARCHITECTURES, make_checkpoint, random_prompts
from support.handover import all_blocks_back, blocks_used, hand_over, make_server, start_all, stop_all
from support.waiting import until
from tpmodel import Client, InvalidRequestError, TpmodelError
from tpmodel.local import LocalServer

TOKENS = 24
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": TOKENS}
PROMPTS = random_prompts(6, shortest=40, longest=90, vocabulary=512, seed=7)
PAIRS = ["1 to 1", "2 to 2", "2 to 4", "4 to 2"]
# Among 4 ranks each head of 2 is held twice: by receivers in "2 to 4", by senders in "4 to 2".
KV_HEADS = 2


@dataclass(frozen=True)
class Gangs:
    """By name; of other block sizes where they continue."""

    servers: dict[str, LocalServer]

    def pair(self, name: str) -> tuple[LocalServer, LocalServer]:
        first, _, second = name.partition(" to ")
        return self.servers[first], self.servers[{"1": "1b", "2": "2b", "4": "4"}[second]]


@pytest.fixture(scope="module")
def gangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gangs]:
    folder = tmp_path_factory.mktemp("handover")
    checkpoint = make_checkpoint(folder / "checkpoint", num_key_value_heads=KV_HEADS)
    one, two = make_server(folder, checkpoint, 1), make_server(folder, checkpoint, 2)
    four = make_server(folder, checkpoint, 4, two, options=["--block-size", "8"])
    servers = {
        "1": one,
        "2": two,
        "4": four,
        "1b": make_server(folder, checkpoint, 1, one, options=["--block-size", "24"]),
        "2b": make_server(folder, checkpoint, 2, two, four),
    }
    try:
        start_all(list(servers.values()))
        yield Gangs(servers)
    finally:
        stop_all([server for server in servers.values() if server.output])


class Load:
    """Requests that a server answers one after the other, in a thread of its own, until the end of a block."""

    def __init__(self, server: LocalServer, prompt: list[int]) -> None:
        self._server, self._prompt = server, prompt
        self.answers: list[tuple[int, ...]] = []
        self._first = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with Client(self._server.target) as client:
            while not self._stopped.is_set():
                self.answers.append(client.complete(self._prompt, **GREEDY).token_ids[0])
                self._first.set()

    def __enter__(self) -> Load:
        self._thread.start()
        assert self._first.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("pair", PAIRS)
def test_the_stream_goes_on_with_the_tokens_of_one_gang(gangs: Gangs, pair: str) -> None:
    """Between any two sizes of gangs and blocks; not a token of the prompt is computed a second time."""
    prefill, decode = gangs.pair(pair)
    with Client(prefill.target) as client:
        whole = client.complete(PROMPTS[0], **GREEDY)
    first, rest = hand_over(prefill, decode, PROMPTS[0], **GREEDY)
    assert first.token_ids[0] == whole.token_ids[0][:1]
    assert rest.token_ids[0] == whole.token_ids[0]
    assert first.text + rest.text == whole.text
    assert rest.completion.usage.cached_tokens == len(PROMPTS[0])
    assert rest.completion.usage.completion_tokens == TOKENS
    all_blocks_back(prefill, decode)


@pytest.mark.parametrize("pair", PAIRS)
def test_it_goes_on_so_beside_other_requests(gangs: Gangs, pair: str) -> None:
    """Several handovers at a time; the others of both gangs go on, with their own tokens."""
    prefill, decode = gangs.pair(pair)
    with Client(prefill.target) as client:
        alone = [client.complete(prompt, **GREEDY).token_ids[0] for prompt in PROMPTS]
    answers: dict[int, tuple[int, ...]] = {}

    def one(index: int) -> None:
        answers[index] = hand_over(prefill, decode, PROMPTS[index], **GREEDY)[1].token_ids[0]

    with Load(prefill, PROMPTS[4]) as first_load, Load(decode, PROMPTS[5]) as second_load:
        threads = [threading.Thread(target=one, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
    assert [answers.get(index) for index in range(4)] == alone[:4]
    assert set(first_load.answers) == {alone[4]}
    assert set(second_load.answers) == {alone[5]}
    all_blocks_back(prefill, decode)


def test_a_sampled_stream_goes_on_with_the_same_noise_and_penalties(gangs: Gangs) -> None:
    """Seed, output position and everything said so far go with the request, and log-probabilities come as before."""
    prefill, decode = gangs.pair("2 to 4")
    options: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 40,
        "top_p": 0.95,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.3,
        "min_tokens": 5,
        "logprobs": 1,
        "max_tokens": TOKENS,
    }
    with Client(prefill.target) as client:
        whole = client.complete(PROMPTS[1], seed=11, **options)
    first, rest = hand_over(prefill, decode, PROMPTS[1], seed=11, **options)
    assert rest.token_ids[0] == whole.token_ids[0]
    assert rest.completion.samples[0].finish_reason == whole.completion.samples[0].finish_reason
    taken = [entry.logprob for entry in [*first.logprobs[0], *rest.logprobs[0]]]
    assert taken == pytest.approx([entry.logprob for entry in whole.logprobs[0]], abs=1e-3)


def test_without_a_seed_the_one_that_was_drawn_goes_with_it(gangs: Gangs) -> None:
    prefill, decode = gangs.pair("1 to 1")
    options = {"temperature": 1.0, "ignore_eos": True, "max_tokens": TOKENS}
    first, rest = hand_over(prefill, decode, PROMPTS[2], **options)
    with Client(prefill.target) as client:
        whole = client.complete(PROMPTS[2], seed=first.seed, **options)
    assert rest.token_ids[0] == whole.token_ids[0]


def test_a_prompt_that_is_handed_over_again_is_found_in_the_prefix_cache(gangs: Gangs) -> None:
    """What came from the other gang is as good as computed here."""
    prefill, decode = gangs.pair("2 to 2")
    prompt = PROMPTS[3][::-1]
    _, rest = hand_over(prefill, decode, prompt, **GREEDY)
    with Client(decode.target) as client:
        again = client.complete(prompt, **GREEDY)
    assert again.token_ids == rest.token_ids
    assert again.completion.usage.cached_tokens == len(prompt) // 16 * 16


def test_what_nobody_comes_for_expires(gangs: Gangs) -> None:
    """The gang that comes too late says so, and what to do."""
    prefill, decode = gangs.pair("2 to 2")
    all_blocks_back(prefill, decode)
    with Client(prefill.target) as client, Client(decode.target) as other:
        first = client.complete(PROMPTS[0], keep_kv=3.0, **GREEDY)
        until(lambda: blocks_used(prefill) > 0, "its blocks are held", 2.5)
        all_blocks_back(prefill)
        with pytest.raises(TpmodelError) as caught:
            other.complete(PROMPTS[0], continues=first, **GREEDY)
        assert caught.value.code == "NOT_FOUND"
        assert prefill.control_target in caught.value.message
        assert "without kv_source" in caught.value.message
    all_blocks_back(decode)


def test_later_handovers_use_the_pipes_of_the_first(gangs: Gangs) -> None:
    """Until either world is rebuilt: see test_kv_handover_faults."""
    prefill, decode = gangs.pair("2 to 2")
    hand_over(prefill, decode, PROMPTS[0], **GREEDY)
    opened = [server.output.count("a pipe was opened") for server in (prefill, decode)]
    assert min(opened) > 0
    for prompt in PROMPTS[1:3]:
        hand_over(prefill, decode, prompt, **GREEDY)
    assert [server.output.count("a pipe was opened") for server in (prefill, decode)] == opened


def test_it_can_be_fetched_once(gangs: Gangs) -> None:
    prefill, decode = gangs.pair("2 to 2")
    with Client(prefill.target) as client, Client(decode.target) as other:
        first = client.complete(PROMPTS[0], keep_kv=30.0, **GREEDY)
        other.complete(PROMPTS[0], continues=first, **GREEDY)
        with pytest.raises(TpmodelError, match="nothing is kept under this ticket"):
            other.complete(PROMPTS[0], continues=first, **GREEDY)
    all_blocks_back(prefill, decode)


def test_another_prompt_than_the_one_that_was_prefilled_is_refused(gangs: Gangs) -> None:
    """Nothing is fetched for it; what is kept stays for whoever has the right one."""
    prefill, decode = gangs.pair("2 to 2")
    with Client(prefill.target) as client, Client(decode.target) as other:
        first = client.complete(PROMPTS[0], keep_kv=30.0, **GREEDY)
        with pytest.raises(InvalidRequestError, match="those that are kept are other ones"):
            other.complete(PROMPTS[0][::-1], continues=first, **GREEDY)
        other.complete(PROMPTS[0], continues=first, **GREEDY)
    all_blocks_back(prefill, decode)


def test_a_gang_fetches_only_from_those_that_it_was_told_of(gangs: Gangs) -> None:
    prefill, _ = gangs.pair("1 to 1")
    _, stranger = gangs.pair("2 to 2")
    with Client(prefill.target) as client, Client(stranger.target) as other:
        first = client.complete(PROMPTS[0], keep_kv=1.0, **GREEDY)
        with pytest.raises(InvalidRequestError, match=r"kv_source\.target: .* is no gang that this one fetches from"):
            other.complete(PROMPTS[0], continues=first, **GREEDY)


def test_an_answer_of_one_token_is_whole(gangs: Gangs) -> None:
    """There is nothing to go on with, and nothing is kept."""
    prefill, _ = gangs.pair("1 to 1")
    with Client(prefill.target) as client:
        result = client.complete(PROMPTS[0], keep_kv=30.0, **(GREEDY | {"max_tokens": 1}))
    assert result.completion.samples[0].finish_reason == "length"
    assert result.completion.kept is None
    all_blocks_back(prefill)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_kv": 0.0}, "keep_kv.seconds"),
        ({"keep_kv": 601.0}, "keep_kv.seconds"),
        ({"keep_kv": 5.0, "n": 2}, "n: 2 with keep_kv"),
    ],
)
def test_what_can_not_be_kept_is_refused_naming_the_field(gangs: Gangs, options: dict[str, Any], message: str) -> None:
    with Client(gangs.servers["1"].target) as client, pytest.raises(InvalidRequestError, match=message):
        client.complete(PROMPTS[0], **GREEDY, **options)


def test_a_model_with_recurrent_state_hands_that_over_too(tmp_path: Path) -> None:
    """Linear attention's state by key-head group, in slots that others used before; one gang has no prefix cache."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **ARCHITECTURES["qwen3_next"])
    options = ["--max-num-seqs", "2"]
    prefill = make_server(tmp_path, checkpoint, 1, options=[*options, "--state-snapshots", "0"])
    decode = make_server(tmp_path, checkpoint, 2, prefill, options=options)
    try:
        start_all([prefill, decode])
        with Client(prefill.target) as client:
            whole = [client.complete(prompt, **GREEDY).token_ids[0] for prompt in PROMPTS[:4]]
        for prompt, tokens in zip(PROMPTS[:4], whole, strict=True):
            assert hand_over(prefill, decode, prompt, **GREEDY)[1].token_ids[0] == tokens
        all_blocks_back(prefill, decode)
        off = "the prefix cache is off: blocks do not hold that state, and state_snapshots is 0"
        assert [server.output.count(off) for server in (prefill, decode)] == [1, 0]
    finally:
        stop_all([server for server in (prefill, decode) if server.output])

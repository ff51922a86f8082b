"""What a client sees of one whole server: sampling, limits, cancels, resumption, both protocols."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
import torch

from support.checkpoints import BASE, make_checkpoint, random_prompts
from support.devices import DEVICES
from support.oracle import Reference
from tpmodel import AsyncClient, Client, InvalidRequestError, OverloadedError, UnavailableError
from tpmodel.channel import RetryPolicy
from tpmodel.local import LocalServer
from tpmodel.v1 import inference_pb2, inference_pb2_grpc

MAX_MODEL_LEN = 256
OPTIONS = [
    "--dtype",
    "float32",
    "--max-model-len",
    str(MAX_MODEL_LEN),
    "--max-num-seqs",
    "8",
    "--kv-cache-memory",
    "4M",
]
PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Weights this small make flat distributions, so that sampling has many likely outcomes.
    return make_checkpoint(tmp_path_factory.mktemp("behaviour"), initializer_range=0.05)


@pytest.fixture(scope="module", params=DEVICES)
def server(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[LocalServer]:
    with LocalServer(checkpoint, tp=2, device=request.param, options=[*OPTIONS, "--queue-limit", "8"]) as server:
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(server: LocalServer, client: Client) -> None:
    alone = [client.complete(PROMPT, max_tokens=24, temperature=1, seed=seed, ignore_eos=True) for seed in range(6)]

    async def at_once() -> list[tuple[int, ...]]:
        async with AsyncClient(server.target) as together:
            calls = [together.complete(PROMPT, max_tokens=24, temperature=1, seed=s, ignore_eos=True) for s in range(6)]
            return [result.token_ids[0] for result in await asyncio.gather(*calls)]

    assert asyncio.run(at_once()) == [result.token_ids[0] for result in alone]
    assert len({result.token_ids[0] for result in alone}) == 6


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_the_same_tokens_at_any_tensor_parallel_size(checkpoint: Path, device: str) -> None:
    def sampled(tp: int) -> list[tuple[int, ...]]:
        with LocalServer(checkpoint, tp=tp, device=device, options=OPTIONS) as server, Client(server.target) as client:
            options = {"max_tokens": 16, "seed": 11, "n": 4, "ignore_eos": True}
            cut = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
            return [*client.complete(PROMPT, temperature=1, **options).token_ids,
                    *client.complete(PROMPT, **cut, **options).token_ids]  # fmt: skip

    assert sampled(1) == sampled(2) == sampled(4)


def test_the_samples_of_a_request_differ_and_are_those_of_their_index(client: Client) -> None:
    together = client.complete(PROMPT, max_tokens=16, temperature=1, seed=3, n=3)
    assert len(set(together.token_ids)) == 3
    assert together.token_ids[0] == client.complete(PROMPT, max_tokens=16, seed=3, temperature=1).token_ids[0]


def test_a_resumed_stream_goes_on_where_it_broke(server: LocalServer, client: Client) -> None:
    options = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True, "frequency_penalty": 0.5}
    whole = client.complete(PROMPT, seed=5, **options)
    ids = whole.token_ids[0]
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=inference_pb2.SamplingParams(seed=5, **options),
            resume_token_ids=ids[:7],
            weight_version=0,
        )
        replies = list(stub.Generate(request, timeout=30))
    rest = [token for reply in replies for token in reply.chunk.token_ids]
    assert rest == list(ids[7:])
    assert replies[-1].completion.usage.completion_tokens == 20


def test_resuming_at_another_weight_version_is_refused(server: LocalServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=inference_pb2.SamplingParams(seed=5),
            resume_token_ids=[20],
            weight_version=7,
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, timeout=30))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_log_probabilities_are_those_of_transformers(client: Client, checkpoint: Path) -> None:
    result = client.complete(PROMPT, max_tokens=8, temperature=0.7, seed=1, logprobs=3, ignore_eos=True)
    ids = result.token_ids[0]
    expected = torch.log_softmax(Reference(checkpoint).logits([*PROMPT, *ids[:-1]])[len(PROMPT) - 1 :], dim=-1)
    for position, entry in enumerate(result.logprobs[0]):
        assert entry.logprob == pytest.approx(float(expected[position, ids[position]]), abs=1e-3)
        best = torch.topk(expected[position], 3)
        assert [token for token, _, _ in entry.top] == best.indices.tolist()


def test_min_tokens_keeps_a_stop_id_away(client: Client) -> None:
    free = client.complete(PROMPT, max_tokens=12, temperature=0, ignore_eos=True).token_ids[0]
    stopped = client.complete(PROMPT, max_tokens=12, temperature=0, stop_token_ids=[free[2]]).token_ids[0]
    kept = client.complete(PROMPT, max_tokens=12, temperature=0, stop_token_ids=[free[2]], min_tokens=6).token_ids[0]
    assert stopped == free[: len(stopped)]
    assert stopped[-1] == free[2]
    assert len(kept) >= 6
    assert free[2] not in kept[:5]


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    text = client.complete(PROMPT, max_tokens=40, temperature=0, ignore_eos=True).text
    stop = text[10:13]
    result = client.complete(PROMPT, max_tokens=40, temperature=0, ignore_eos=True, stop=[stop])
    assert result.text == text[: text.index(stop)]
    assert result.completion.samples[0].stop == stop


def test_a_prompt_longer_than_the_context_names_both_numbers(client: Client) -> None:
    with pytest.raises(InvalidRequestError, match=rf"300.*{MAX_MODEL_LEN}"):
        client.complete([5] * 300)


def test_a_full_queue_is_refused(server: LocalServer) -> None:
    """8 run, 8 wait, the rest is refused; those that were taken end whole."""

    async def flood() -> list[object]:
        async with AsyncClient(server.target) as many:
            calls = [many.complete(PROMPT, max_tokens=100, temperature=0, ignore_eos=True) for _ in range(48)]
            return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(flood())
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert refused
    assert all(isinstance(outcome, OverloadedError) for outcome in refused)
    assert len(outcomes) - len(refused) >= 16


def test_a_dropped_client_gives_its_blocks_back(server: LocalServer, client: Client) -> None:
    """P14."""
    with Client(server.target) as leaving:
        stream = leaving.generate(PROMPT, max_tokens=200, temperature=0, ignore_eos=True)
        next(stream)
        stream.cancel()
    deadline = time.monotonic() + 5
    while client.load().kv_blocks_used:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_same_prompt_hits_the_prefix_cache(client: Client) -> None:
    prompt = random_prompts(1, shortest=100, longest=100, vocabulary=BASE["vocab_size"], seed=77)[0]
    first = client.complete(prompt, max_tokens=4, temperature=0)
    second = client.complete(prompt, max_tokens=4, temperature=0)
    assert first.completion.usage.cached_tokens == 0
    assert second.completion.usage.cached_tokens == 96
    assert second.token_ids == first.token_ids


def test_the_stock_openai_client_completes_and_streams(server: LocalServer, client: Client) -> None:
    expected = client.complete("hello", max_tokens=12, temperature=0, ignore_eos=True).text
    stock = openai.OpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0)
    model = stock.models.list().data[0].id
    options = {"model": model, "prompt": "hello", "max_tokens": 12, "temperature": 0}
    whole = stock.completions.create(**options, extra_body={"ignore_eos": True})
    parts = stock.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    assert whole.choices[0].text == expected
    assert "".join(part.choices[0].text for part in parts if part.choices) == expected
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


def test_health_and_metrics_are_served_over_http(server: LocalServer) -> None:
    with urllib.request.urlopen(f"{server.http_url}/health", timeout=10) as reply:
        assert reply.status == 200
    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        text = reply.read().decode()
    for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio", "prefix_cache_hits_total",
                 "time_to_first_token_seconds_count", "inter_token_seconds_count", "step_seconds_count",
                 "plan_seconds_count", "generated_tokens_total"):  # fmt: skip
        assert f"tpmodel_{name}" in text, name


def test_requests_before_the_world_is_built_say_so(checkpoint: Path) -> None:
    """W22: while the ranks are still starting."""
    server = LocalServer(checkpoint, tp=1, device="cpu", options=[*OPTIONS, "--log-format", "json"]).launch()
    try:
        target = _early_target(server)
        with Client(target, retry=RetryPolicy(window=0.01)) as early:
            with pytest.raises(UnavailableError, match="world not built yet"):
                early.complete(PROMPT, max_tokens=1)
    finally:
        server.stop()


def _early_target(server: LocalServer) -> str:
    """The address that the api process logs before the world is built."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in server.output.splitlines():
            if line.startswith("{") and "gRPC on " in (message := json.loads(line)["message"]):
                return message.split("gRPC on ")[1].split(",")[0]
        time.sleep(0.01)
    raise AssertionError(server.output)

"""`tpmodel bench`: load a server and print how fast it answers."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from tpmodel.async_client import AsyncClient
from tpmodel.cli.common import api_key_or_environment, channel_credentials, connection_options, readable_errors


@dataclass(slots=True)
class _Timings:
    """Seconds, over all requests."""

    first_token: list[float] = field(default_factory=list)
    between_chunks: list[float] = field(default_factory=list)
    tokens: int = 0


@click.command()
@connection_options
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True, help="How many in all.")
@click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True, help="At the same time.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--channels", type=click.IntRange(min=1), default=1, show_default=True, help="gRPC connections.")
@click.option("--text", is_flag=True, help="Have the server detokenize.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random prompts.")
def bench(
    target: str,
    api_key: str | None,
    tls_ca: Path | None,
    requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    channels: int,
    text: bool,
    seed: int,
) -> None:
    """Send random prompts and report tokens per second, time to first token and gaps."""
    clients = min(channels, concurrency)

    async def run() -> tuple[float, _Timings]:
        key, credentials = api_key_or_environment(api_key), channel_credentials(tls_ca)
        connections = [AsyncClient(target, api_key=key, credentials=credentials) for _ in range(clients)]
        try:
            vocabulary = (await connections[0].model_info()).vocab_size
            rng = random.Random(seed)  # noqa: S311
            prompts = [[rng.randrange(vocabulary) for _ in range(prompt_tokens)] for _ in range(requests)]
            timings = _Timings()
            started = time.perf_counter()
            pending = iter(enumerate(prompts))

            async def worker(index: int) -> None:
                for _, prompt in pending:
                    await _one(connections[index % clients], prompt, output_tokens, text, timings)

            await asyncio.gather(*(worker(index) for index in range(concurrency)))
            return time.perf_counter() - started, timings
        finally:
            for connection in connections:
                await connection.close()

    with readable_errors(target):
        seconds, timings = asyncio.run(run())
    click.echo(
        f"{requests} requests of {prompt_tokens} + {output_tokens} tokens, {concurrency} at once: {seconds:.2f} s"
    )
    click.echo(f"output tokens/s   {timings.tokens / seconds:10.1f}")
    for name, values in (("first token, ms", timings.first_token), ("gap, ms", timings.between_chunks)):
        if values:
            ordered = sorted(values)
            worst = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
            click.echo(f"{name:16}  p50 {1000 * statistics.median(ordered):8.2f}  p99 {1000 * worst:8.2f}")


async def _one(client: AsyncClient, prompt: list[int], output_tokens: int, text: bool, timings: _Timings) -> None:
    started = last = time.perf_counter()
    stream = client.generate(prompt, max_tokens=output_tokens, temperature=0, ignore_eos=True, detokenize=text)
    first = True
    async for chunk in stream:
        now = time.perf_counter()
        if first:
            timings.first_token.append(now - started)
            first = False
        else:
            timings.between_chunks.append(now - last)
        last = now
        timings.tokens += len(chunk.token_ids)

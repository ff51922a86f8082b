"""`tpmodel generate`: one prompt, its answer streamed to the terminal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from tpmodel.channel import RetryPolicy
from tpmodel.cli.common import api_key_or_environment, connection_options, readable_errors, sampling_options
from tpmodel.client import Client, GenerateStream


class TokenIdList(click.ParamType):
    """Comma-separated token ids."""

    name = "1,2,3"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """The ids, or a usage error."""
        try:
            ids = [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of token ids like 1,2,3", param, ctx)
        if min(ids) < 0:
            self.fail(f"{min(ids)} is negative: token ids start at 0", param, ctx)
        return ids


@click.command()
@connection_options
@click.argument("prompt", required=False)
@click.option("--token-ids", type=TokenIdList(), default=None, help="The prompt as token ids instead of text.")
@sampling_options
@click.option("--ignore-eos", is_flag=True, help="Go on past the end of sequence, up to --max-tokens.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: chunks, then the completion.")
@click.option("--timeout", type=float, default=None, help="Seconds for the whole request.")
@click.option("--wait", type=float, default=10.0, show_default=True, help="Seconds to wait for a server.")
def generate(
    target: str,
    api_key: str | None,
    prompt: str | None,
    token_ids: list[int] | None,
    ignore_eos: bool,
    as_json: bool,
    timeout: float | None,
    wait: float,
    **sampling: Any,
) -> None:
    """Continue PROMPT (or --token-ids) and stream the answer."""
    if (prompt is None) == (token_ids is None):
        raise click.UsageError("give either PROMPT or --token-ids")
    sampling["stop"] = list(sampling["stop"])
    retry = RetryPolicy(window=wait)
    with readable_errors(target), Client(target, api_key=api_key_or_environment(api_key), retry=retry) as client:
        stream = client.generate(
            prompt if prompt is not None else token_ids or [],
            timeout=timeout,
            ignore_eos=ignore_eos or None,
            **sampling,
        )
        try:
            (_print_json if as_json else _print_text)(stream)
        except KeyboardInterrupt:
            stream.cancel()
            raise


def _print_text(stream: GenerateStream) -> None:
    for chunk in stream:
        click.echo(chunk.text, nl=False)
    click.echo()


def _print_json(stream: GenerateStream) -> None:
    for chunk in stream:
        line = {"sample_index": chunk.sample_index, "token_ids": chunk.token_ids, "text": chunk.text}
        click.echo(json.dumps(line))
    end = dataclasses.asdict(stream.completion) | {"request_id": stream.request_id}
    click.echo(json.dumps({"completion": end}))

"""`tpmodel generate`: one prompt, its answer streamed to the terminal."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tpmodel.channel import RetryPolicy
from tpmodel.cli.common import (
    SAMPLING,
    api_key_or_environment,
    channel_credentials,
    connection_options,
    readable_errors,
    sampling_options,
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and how the answer is shown."""

    prompt: str | list[int]
    sampling: dict[str, Any]
    timeout: float | None
    wait: float
    """Seconds to wait for a server."""
    as_json: bool

    def answer(self, target: str, *, api_key: str | None, **tls: Any) -> None:
        """Asks the server and prints the answer as it comes. tls: credentials and server_name, as Client takes them.

        Raises:
            TpmodelError: it could not be had.
        """
        retry = RetryPolicy(window=self.wait)
        with Client(target, api_key=api_key_or_environment(api_key), retry=retry, **tls) as client:
            stream = client.generate(self.prompt, timeout=self.timeout, **self.sampling)
            try:
                (_print_json if self.as_json else _print_text)(stream)
            except KeyboardInterrupt:
                stream.cancel()
                raise


def question_options(command: Callable[..., None]) -> Callable[..., None]:
    """PROMPT, --token-ids and all that says how to answer; the command gets a Question."""

    @functools.wraps(command)
    def ask(
        *arguments: Any,
        prompt: str | None,
        token_ids: list[int] | None,
        ignore_eos: bool,
        as_json: bool,
        timeout: float | None,
        wait: float,
        **others: Any,
    ) -> None:
        if (prompt is None) == (token_ids is None):
            raise click.UsageError("give either PROMPT or --token-ids")
        sampling: dict[str, Any] = {name: others.pop(name) for name in SAMPLING}
        sampling |= {"stop": list(sampling["stop"]), "ignore_eos": ignore_eos or None}
        question = Question(
            prompt=prompt if prompt is not None else token_ids or [],
            sampling=sampling,
            timeout=timeout,
            wait=wait,
            as_json=as_json,
        )
        command(*arguments, question=question, **others)

    options = [
        click.argument("prompt", required=False),
        click.option("--token-ids", type=TokenIdList(), default=None, help="The prompt as token ids instead of text."),
        sampling_options,
        click.option("--ignore-eos", is_flag=True, help="Go on past the end of sequence, up to --max-tokens."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object a line: chunks, then the completion."),
        click.option("--timeout", type=float, default=None, help="Seconds for the whole request."),
        click.option("--wait", type=float, default=10.0, show_default=True, help="Seconds to wait for a server."),
    ]
    for option in reversed(options):
        ask = option(ask)
    return ask


@click.command()
@connection_options
@question_options
def generate(target: str, api_key: str | None, tls_ca: Path | None, question: Question) -> None:
    """Continue PROMPT (or --token-ids) and stream the answer."""
    with readable_errors(target):
        question.answer(target, api_key=api_key, credentials=channel_credentials(tls_ca))


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

"""`tpmodel chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tpmodel.channel import RetryPolicy
from tpmodel.cli.common import (
    api_key_or_environment,
    channel_credentials,
    connection_options,
    readable_errors,
    sampling_options,
)
from tpmodel.client import Client
from tpmodel.errors import InvalidRequestError
from tpmodel.types import ChatMessage


@click.command()
@connection_options
@click.option("--system", default=None, help="The system message.")
@sampling_options
def chat(target: str, api_key: str | None, tls_ca: Path | None, system: str | None, **sampling: Any) -> None:
    """Talk with the model; an empty line or Ctrl-D ends it, Ctrl-C cuts an answer short."""
    sampling["stop"] = list(sampling["stop"])
    messages = [ChatMessage("system", system)] if system else []
    key, credentials = api_key_or_environment(api_key), channel_credentials(tls_ca)
    retry = RetryPolicy(window=10.0)
    with readable_errors(target), Client(target, api_key=key, retry=retry, credentials=credentials) as client:
        while question := _ask():
            messages.append(ChatMessage("user", question))
            try:
                answer = _answer(client, messages, sampling)
            except InvalidRequestError as error:
                # A conversation that has outgrown the context goes on without its last turn.
                messages.pop()
                click.echo(f"error: {error.message}", err=True)
                continue
            messages.append(ChatMessage("assistant", answer))


def _ask() -> str:
    if sys.stdin is None:  # it was closed before the command started
        return ""
    try:
        return click.prompt(">", prompt_suffix=" ", default="", show_default=False)
    except click.Abort:
        click.echo()
        return ""


def _answer(client: Client, messages: list[ChatMessage], sampling: dict[str, Any]) -> str:
    stream = client.generate(messages, **sampling)
    parts: list[str] = []
    try:
        for chunk in stream:
            parts.append(chunk.text)
            click.echo(chunk.text, nl=False)
    except KeyboardInterrupt:
        stream.cancel()
    click.echo()
    return "".join(parts)

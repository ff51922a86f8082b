"""What several commands share: options and how errors end a command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc

from tpmodel.errors import TpmodelError, UnavailableError, UnsupportedError
from tpmodel.token_files import TokenFileError, read_token

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_TARGET = "127.0.0.1:9000"
SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")
"""What sampling_options gives a command."""


def connection_options(command: F) -> F:
    """--target, --api-key and --tls-ca."""
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    text = "PEM file of certificates to trust; the connection then uses TLS."
    command = click.option("--tls-ca", type=file, default=None, help=text)(command)
    command = api_key_option(command)
    return click.option("--target", default=DEFAULT_TARGET, show_default=True, help="Server, HOST:PORT.")(command)


def api_key_option(command: F) -> F:
    """--api-key."""
    return click.option("--api-key", default=None, help="Sent as bearer token; default: $TPMODEL_API_KEY.")(command)


def read_token_option(option: str, path: str | Path) -> str:
    """The token in the file that an option names. Raises a usage error that names the option."""
    try:
        return read_token(path)
    except TokenFileError as error:
        raise click.BadParameter(str(error), param_hint=option) from error


def api_key_or_environment(api_key: str | None) -> str | None:
    """The option's value, else what the environment says."""
    return api_key or os.environ.get("TPMODEL_API_KEY") or None


def channel_credentials(tls_ca: Path | None) -> grpc.ChannelCredentials | None:
    """None: plain text."""
    return grpc.ssl_channel_credentials(tls_ca.read_bytes()) if tls_ca is not None else None


def sampling_options(command: F) -> F:
    """The sampling parameters that people set by hand."""
    options = [
        click.option("--max-tokens", type=click.IntRange(min=1), default=None, help="Most tokens to make."),
        click.option("--temperature", type=click.FloatRange(min=0), default=None, help="0 is greedy."),
        click.option("--top-k", type=int, default=None, help="Sample among the k most likely tokens."),
        click.option("--top-p", type=float, default=None, help="Sample among tokens of this total probability."),
        click.option("--seed", type=click.IntRange(min=0), default=None, help="Makes sampling repeatable."),
        click.option("--stop", multiple=True, help="Ends the answer; may be given several times."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def readable_errors(target: str) -> Iterator[None]:
    """Turns a failed call into one line on standard error and exit code 1."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit() or host.startswith(("http://", "https://")):
        raise click.BadParameter(f"{target!r} is not HOST:PORT", param_hint="--target")
    try:
        yield
    except UnavailableError as error:
        hint = "that is an HTTP port, give a gRPC one" if "http1" in error.message else "is a server running there?"
        raise click.ClickException(f"{target}: {error.message}; {hint}") from error
    except UnsupportedError as error:
        raise click.ClickException(
            f"{target}: this port does not serve the call; `tpmodel serve` has inference on --port (9000) and status "
            "on --health-port (9002)"
        ) from error
    except TpmodelError as error:
        raise click.ClickException(f"{target}: {error}") from error

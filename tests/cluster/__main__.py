"""Command line of the test cluster: `python -m tests.cluster --help`."""

from __future__ import annotations

import os
import subprocess
import sys

import click

from . import apiserver as apiserver_module
from . import binaries as binaries_module
from .errors import ClusterError


class _Commands(click.Group):
    """Errors of the cluster are one message, not a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ClusterError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands)
def main() -> None:
    """A real Kubernetes cluster on this machine, for tests."""


@main.command()
@click.argument("names", nargs=-1)
def binaries(names: tuple[str, ...]) -> None:
    """Builds the cluster's programs, or those named, and prints their paths."""
    known = {program.name: program for program in binaries_module.ALL_PROGRAMS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise click.UsageError(f"no such program: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = tuple(known[name] for name in names) or binaries_module.ALL_PROGRAMS
    for path in binaries_module.ensure(chosen):
        click.echo(path)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def apiserver(command: tuple[str, ...]) -> None:
    """Runs etcd and kube-apiserver alone, on free ports: for COMMAND with KUBECONFIG set, else until Ctrl-C."""
    with apiserver_module.running() as api:
        if command:
            environment = os.environ | {"KUBECONFIG": str(api.kubeconfig)}
            sys.exit(subprocess.run(command, env=environment).returncode)
        click.echo(f"export KUBECONFIG={api.kubeconfig}")
        api.apiserver.wait()


if __name__ == "__main__":
    main()

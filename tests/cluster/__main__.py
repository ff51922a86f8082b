"""Command line of the test cluster: `python -m tests.cluster --help`."""

from __future__ import annotations

import os
import subprocess
import sys

import click

from . import apiserver as apiserver_module
from . import binaries as binaries_module
from . import target
from .errors import ClusterError
from .local import NODES, LocalCluster


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
@click.option("--nodes", default=NODES, show_default=True, help="How many nodes.")
@click.option("--images/--no-images", default=True, help="Whether nodes have the project's images.")
def up(nodes: int, images: bool) -> None:
    """Brings the cluster up, or up to date, and prints how to reach it."""
    if images:
        made = target.up(nodes=nodes, replace=True)
        for name in (made.worker_image, made.operator_image):
            click.echo(f"# has image {name}")
        path = made.kubectl.kubeconfig
    else:
        cluster = LocalCluster(count=nodes)
        cluster.up()
        path = cluster.kubeconfig
    click.echo(f"export KUBECONFIG={path}")


@main.command()
def check() -> None:
    """Says what this machine lacks for the cluster of the end-to-end tests."""
    target.check()


@main.command()
def build() -> None:
    """Builds programs, images and the disk that nodes start from, so that `up` takes seconds; starts nothing."""
    target.build()


@main.command()
def down() -> None:
    """Removes the cluster, whatever state it is in. Programs and images stay in the cache."""
    LocalCluster().down()


@main.command()
def images() -> None:
    """Builds the images of the code as it is now, loads them into the running cluster, and prints their names."""
    made = target.up(nodes=LocalCluster.running().count)
    click.echo(f"{made.worker_image}\n{made.operator_image}")


@main.command()
def kubeconfig() -> None:
    """Prints the path of the running cluster's kubeconfig."""
    click.echo(LocalCluster.running().kubeconfig)


@main.command()
def status() -> None:
    """Says which parts of the cluster run."""
    cluster = LocalCluster.running()
    for daemon in cluster.daemons():
        click.echo(f"{daemon.log.parent.name}/{daemon.name}: {'runs' if daemon.running() else 'has ended'}")
    waiting = cluster.not_ready()
    click.echo(f"not Ready: {', '.join(waiting)}" if waiting else "every node is Ready")


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

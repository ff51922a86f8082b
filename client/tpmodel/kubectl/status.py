"""`kubectl tpmodel status`: one TPModel with its conditions, gangs and pods."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import click

from tpmodel.kubectl.connection import connection_options
from tpmodel.kubectl.interrupts import until_interrupted
from tpmodel.kubectl.kubectl import Kubectl, with_kubectl
from tpmodel.kubectl.lookup import find_model
from tpmodel.kubectl.problems import KubectlError
from tpmodel.kubectl.tree import render
from tpmodel.kubectl.view import ModelView
from tpmodel.kubectl.warnings import with_warnings

WATCH_SECONDS = 2.0
_CLEAR_SCREEN = "\x1b[H\x1b[2J\x1b[3J"


@click.command()
@click.argument("model")
@click.option("-w", "--watch", is_flag=True, help="Show it again whenever it changes, until Ctrl-C.")
@click.option("-o", "--output", type=click.Choice(["tree", "json"]), default="tree", show_default=True)
@connection_options
@with_kubectl
def status(kubectl: Kubectl, model: str, watch: bool, output: str) -> None:
    """Show MODEL: its conditions, its gangs, and their pods."""
    show = _json if output == "json" else _tree

    def look() -> ModelView:
        return with_warnings(kubectl, find_model(kubectl, model))

    if not watch:
        click.echo(show(look()))
        return
    on_terminal = sys.stdout.isatty() and output == "tree"
    with until_interrupted():
        (repeat if on_terminal else print_changes)(look, show)


def repeat(look: Callable[[], ModelView], show: Callable[[ModelView], str]) -> None:
    """Draws the screen anew, for ever; later failures are shown in its place."""
    text = show(look())
    while True:
        click.echo(f"{_CLEAR_SCREEN}{text}")
        time.sleep(WATCH_SECONDS)
        try:
            text = show(look())
        except KubectlError as error:
            text = f"Error: {error.message}"


def print_changes(
    look: Callable[[], ModelView], show: Callable[[ModelView], str], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Prints it when it is another than before, for ever; ages alone are no change. The first look must succeed."""
    before = look()
    click.echo(show(before))
    while True:
        sleep(WATCH_SECONDS)
        try:
            now = look()
        except KubectlError as error:
            click.echo(f"Error: {error.message}", err=True)
            continue
        if now != before:
            before = now
            click.echo(show(now))


def _tree(model: ModelView) -> str:
    return "\n".join(render(model, datetime.now(UTC)))


def _json(model: ModelView) -> str:
    """One line, so that --watch gives one object a line."""
    return json.dumps(dataclasses.asdict(model) | {"why": model.problem})

"""`kubectl tpmodel list`: all TPModels of a namespace, and why those do not serve that should."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from tpmodel.cli.tables import table
from tpmodel.kubectl.ages import age
from tpmodel.kubectl.connection import connection_options
from tpmodel.kubectl.kubectl import Kubectl, with_kubectl
from tpmodel.kubectl.names import MODELS
from tpmodel.kubectl.view import ModelView, model_view


@click.command("list")
@click.option("-A", "--all-namespaces", is_flag=True, help="Of the whole cluster.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@connection_options
@with_kubectl
def list_models(kubectl: Kubectl, all_namespaces: bool, output: str) -> None:
    """Show all TPModels."""
    items = kubectl.items(MODELS, *(["--all-namespaces"] if all_namespaces else []))
    models = sorted((model_view(item) for item in items), key=lambda model: (model.namespace, model.name))
    if output == "json":
        click.echo(json.dumps([dataclasses.asdict(model) | {"why": model.problem} for model in models]))
        return
    if not models:
        click.echo("there are no TPModels" + ("" if all_namespaces else " in this namespace"), err=True)
    for line in lines(models, datetime.now(UTC), with_namespace=all_namespaces):
        click.echo(line)


def lines(models: Sequence[ModelView], now: datetime, *, with_namespace: bool) -> list[str]:
    """The table."""
    header = ["NAME", "MODEL", "TP", "READY", "STATUS", "RESTARTS", "AGE", "WHY"]
    rows = [_row(model, now) for model in models]
    if with_namespace:
        header = ["NAMESPACE", *header]
        rows = [[model.namespace, *row] for model, row in zip(models, rows, strict=True)]
    return table(header, rows)


def _row(model: ModelView, now: datetime) -> list[str]:
    return [
        model.name,
        model.uri,
        str(model.tensor_parallel_size),
        model.ready or f"0/{model.replicas}",
        model.state or "Unknown",
        str(model.restarts),
        age(model.created, now),
        model.problem,
    ]

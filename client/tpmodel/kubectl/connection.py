"""Which cluster and namespace: options that are passed on to kubectl as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_META = "tpmodel.kubectl.connection"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Empty fields: as kubectl's configuration says."""

    context: str = ""
    namespace: str = ""
    kubeconfig: str = ""

    @property
    def arguments(self) -> list[str]:
        """As kubectl takes them."""
        given = {"context": self.context, "namespace": self.namespace, "kubeconfig": self.kubeconfig}
        return [f"--{name}={value}" for name, value in given.items() if value]

    @classmethod
    def current(cls) -> Connection:
        """What the command that runs was told."""
        return cls(**click.get_current_context().meta.get(_META, {}))


def connection_options(command: F) -> F:
    """--context, --namespace and --kubeconfig: before a command's name or after it, where the latter wins."""
    texts = {
        ("--kubeconfig",): "Passed to kubectl.",
        ("--context",): "Passed to kubectl.",
        ("--namespace", "-n"): "The TPModel's namespace; default: the context's.",
    }
    for names, text in texts.items():
        command = click.option(*names, default=None, expose_value=False, callback=_remember, help=text)(command)
    return command


def _remember(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.meta.setdefault(_META, {})[parameter.name] = value

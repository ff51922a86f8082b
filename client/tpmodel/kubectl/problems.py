"""What kubectl complains of, in one line that says what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable

import click

_LOG_LINE = re.compile(r"^[IWEF]\d{4} ")
_REMARK = re.compile(r"^(error|Error from server( \(\w+\))?|Error in configuration): ", re.IGNORECASE)


class KubectlError(click.ClickException):
    """kubectl failed; the message is for the user. `output` is what kubectl itself wrote to standard error."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output

    @property
    def not_found(self) -> bool:
        """Whether the object does not exist."""
        return "(NotFound)" in self.output


NO_KUBECTL = "kubectl is not in PATH: install it, this plugin talks to the cluster through it"
NO_CLUSTER = (
    "kubectl knows no cluster: choose a context (kubectl config use-context NAME; kubectl config get-contexts lists "
    "them), or give --kubeconfig"
)
NO_MODELS = "this cluster knows no TPModels: install the operator (helm install, see docs/kubernetes.md)"


def explain(output: str) -> KubectlError:
    """The error for what kubectl wrote to standard error."""
    said = last_words(output)
    for pattern, answer in _ANSWERS:
        if found := pattern.search(output):
            return KubectlError(answer(found, said), output)
    return KubectlError(f"kubectl: {said}", output)


def last_words(output: str) -> str:
    """The last line that is meant for people."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for_people = [line for line in lines if not _LOG_LINE.match(line)]
    words = (for_people or lines or ["it ended without a word"])[-1]
    return _REMARK.sub("", words)


def _always(text: str) -> Callable[[re.Match[str], str], str]:
    return lambda _found, _said: text


_ANSWERS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], str]], ...] = (
    (
        re.compile(r"context was not found for specified context: (\S+)|context \"(\S+)\" does not exist"),
        lambda found, _: f"there is no context {found[1] or found[2]}: kubectl config get-contexts lists them",
    ),
    # Where no context is chosen, kubectl tries this one.
    (re.compile(r"server localhost:8080 was refused"), _always(NO_CLUSTER)),
    (re.compile(r"doesn't have a resource type \"tpmodels|could not find the requested resource"), _always(NO_MODELS)),
    (
        re.compile(r"\(Forbidden\)"),
        lambda _, said: f"{said}; ask for a role that allows it (edit and view of the namespace include TPModels)",
    ),
    (
        re.compile(r"\(Unauthorized\)|must be logged in|[Uu]nauthorized"),
        lambda _, said: f"the cluster does not know you: log in again ({said})",
    ),
    (
        re.compile(r"unable to listen on port (\d+)", re.IGNORECASE),
        lambda found, _: f"port {found[1]} of this machine is taken: give another one with --port and --http-port",
    ),
    (
        re.compile(r"was refused|i/o timeout|no such host|deadline exceeded|no route to host|TLS handshake timeout"),
        lambda _, said: f"the API server does not answer: {said}; is the cluster up, and the right context chosen?",
    ),
)
"""The first that matches counts."""

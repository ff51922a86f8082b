"""Runs kubectl: it has the user's contexts, credentials and proxies, so this plugin needs none of that."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from tpmodel.kubectl import problems
from tpmodel.kubectl.connection import Connection
from tpmodel.kubectl.problems import KubectlError

Json = dict[str, Any]

ANSWER_SECONDS = 20
"""For one request of a `kubectl get`."""
_END_SECONDS = 60.0
"""For the whole of it: kubectl asks several times."""


class Kubectl:
    """Commands for one cluster and namespace. Failures are KubectlError."""

    def __init__(self, connection: Connection) -> None:
        program = shutil.which("kubectl")
        if program is None:
            raise KubectlError(problems.NO_KUBECTL)
        self.connection = connection
        self._command = [program, *connection.arguments]

    def get(self, *arguments: str) -> Json:
        """`kubectl get`: an object, or a list with items."""
        command = [*self._command, "get", *arguments, "--output=json", f"--request-timeout={ANSWER_SECONDS}s"]
        try:
            # No standard input: kubectl would ask for a user name there, and nobody would see the question.
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_END_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise KubectlError(f"the API server does not answer: nothing within {_END_SECONDS:.0f} s") from error
        if result.returncode != 0:
            raise problems.explain(result.stderr)
        return json.loads(result.stdout)

    def items(self, *arguments: str) -> list[Json]:
        """`kubectl get` of a list."""
        return self.get(*arguments)["items"]

    def open(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that goes on, such as logs or port-forward; its output is the caller's to read."""
        return subprocess.Popen(
            [*self._command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )


P = ParamSpec("P")
R = TypeVar("R")


def with_kubectl(command: Callable[Concatenate[Kubectl, P], R]) -> Callable[P, R]:
    """Gives a command a Kubectl for the cluster that its options name."""

    @functools.wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        return command(Kubectl(Connection.current()), *arguments, **options)

    return run

"""kubectl for tests: objects as dictionaries, errors as exceptions."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import binaries
from .errors import ClusterError

Object = dict[str, Any]


class KubectlError(ClusterError):
    """A kubectl command failed; `output` is what it wrote, refusals of the API server included."""

    def __init__(self, command: Sequence[str], output: str) -> None:
        super().__init__(f"{' '.join(command)}\n{output.strip()}")
        self.output = output


@dataclass(frozen=True)
class Kubectl:
    """Commands for one cluster and, where set, one namespace."""

    kubeconfig: Path
    namespace: str | None = None

    def within(self, namespace: str) -> Kubectl:
        """The same for another namespace."""
        return replace(self, namespace=namespace)

    def run(self, *arguments: str, standard_input: str | None = None, seconds: float = 60) -> str:
        """Runs a command to its end and returns what it wrote to standard output."""
        command = self.command(*arguments)
        try:
            result = subprocess.run(
                command, input=standard_input, capture_output=True, text=True, timeout=seconds, env=self.environment()
            )
        except subprocess.TimeoutExpired as error:
            raise KubectlError(command[2:], f"not done within {seconds:.0f} s") from error
        if result.returncode != 0:
            raise KubectlError(command[2:], result.stdout + result.stderr)
        return result.stdout

    def command(self, *arguments: str) -> list[str]:
        """The whole command line, for callers that keep a process open (port-forward, logs --follow)."""
        own = [str(binaries.path(binaries.KUBECTL)), f"--kubeconfig={self.kubeconfig}"]
        return [*own, *([f"--namespace={self.namespace}"] if self.namespace else []), *arguments]

    def environment(self) -> dict[str, str]:
        """For programs that look for a kubeconfig themselves."""
        return os.environ | {"KUBECONFIG": str(self.kubeconfig)}

    def apply(self, *objects: Mapping[str, Any], manager: str = "tests") -> None:
        """Server-side apply of objects, in order."""
        for item in objects:
            arguments = ["apply", "--server-side", "--force-conflicts", f"--field-manager={manager}", "--filename=-"]
            self.run(*arguments, standard_input=json.dumps(item))

    def get(self, kind: str, name: str) -> Object:
        """One object."""
        return json.loads(self.run("get", kind, name, "--output=json"))

    def find(self, kind: str, name: str) -> Object | None:
        """One object, or None where there is none of this name."""
        text = self.run("get", kind, name, "--output=json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, *, selector: str = "", everywhere: bool = False) -> list[Object]:
        """Objects of a kind."""
        arguments = ["get", kind, "--output=json"]
        if selector:
            arguments.append(f"--selector={selector}")
        if everywhere:
            arguments.append("--all-namespaces")
        return json.loads(self.run(*arguments))["items"]

    def patch(self, kind: str, name: str, change: Mapping[str, Any], *, subresource: str = "") -> None:
        """A merge patch."""
        arguments = ["patch", kind, name, "--type=merge", f"--patch={json.dumps(change)}"]
        self.run(*arguments, *([f"--subresource={subresource}"] if subresource else []))

    def delete(
        self, kind: str, name: str, *, wait: bool = True, seconds: float = 120, grace: int | None = None
    ) -> None:
        """Deletes an object if it exists; with `wait` returns when it is gone."""
        arguments = ["delete", kind, name, "--ignore-not-found", f"--wait={str(wait).lower()}"]
        if grace is not None:
            arguments += [f"--grace-period={grace}", *(["--force"] if grace == 0 else [])]
        self.run(*arguments, seconds=seconds)

    def wait(self, kind: str, name: str, condition: str, *, seconds: float = 120) -> None:
        """`kubectl wait --for=CONDITION`, such as condition=Ready or jsonpath={.status.phase}=Running."""
        arguments = ["wait", f"{kind}/{name}", f"--for={condition}", f"--timeout={seconds:.0f}s"]
        self.run(*arguments, seconds=seconds + 15)

    def execute(self, pod: str, *command: str, container: str = "", seconds: float = 60) -> str:
        """Runs a command in a pod and returns what it wrote."""
        chosen = [f"--container={container}"] if container else []
        return self.run("exec", pod, *chosen, "--", *command, seconds=seconds)

    def logs(self, pod: str, *, container: str = "", previous: bool = False) -> str:
        """A pod's log."""
        chosen = [f"--container={container}"] if container else ["--all-containers"]
        return self.run("logs", pod, *chosen, *(["--previous"] if previous else []))

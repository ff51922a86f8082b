"""Every state that a model's pods went through, as a watch tells it: polling would miss the short ones."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Self

from tests.cluster.kubectl import Object
from tests.cluster.waiting import wait_until
from tests.e2e.support.models import DeployedModel
from tpmodel_operator import names

FIRST_SECONDS = 30.0
"""Until the watch has told what is there already."""


@dataclass
class PodHistory:
    """Watches for as long as a `with` block lasts."""

    model: DeployedModel
    states: list[list[Object]] = field(default_factory=list)
    """All pods of the model after each change, the oldest first."""
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Returns when it has seen the pods that are there."""
        selector = f"--selector={names.MODEL_LABEL}={self.model.name}"
        watch = ["get", "pods", selector, "--watch", "--output-watch-events", "--output=json"]
        self._process = subprocess.Popen(self.model.kubectl.command(*watch), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        there = len(self.model.pods())
        wait_until(
            lambda: self.states and len(self.states[-1]) == there, what="a watch of the pods", seconds=FIRST_SECONDS
        )
        del self.states[:-1]
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the watch."""
        assert self._process is not None
        assert self._process.poll() is None, "the watch ended early"
        self._process.kill()
        self._process.wait()

    def _read(self, output: IO[str]) -> None:
        pods: dict[str, Object] = {}
        for event in _objects(output):
            pod = event["object"]
            pods[pod["metadata"]["uid"]] = pod
            if event["type"] == "DELETED":
                del pods[pod["metadata"]["uid"]]
            self.states.append(list(pods.values()))


def _objects(lines: IO[str]) -> Iterator[Object]:
    """JSON objects one after the other, each in a line, or indented over several."""
    text: list[str] = []
    for line in lines:
        text.append(line)
        if line[0] in "{}" and line.rstrip().endswith("}"):
            yield json.loads("".join(text))
            text.clear()
